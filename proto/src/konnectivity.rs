//! The packets of Konnectivity's `ProxyService`, which kube-apiserver's egress selector uses in `GRPC` mode
//! (apiserver-network-proxy, `konnectivity-client/proto/client/client.proto`).

use bytes::Bytes;

/// The only method of the service: a stream of [`Packet`]s in each direction.
pub const PROXY: &str = "/ProxyService/Proxy";
/// The only value of [`DialRequest::protocol`].
pub const TCP: &str = "tcp";

/// What a packet holds, according to its field `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum PacketType {
    DialRequest = 0,
    DialResponse = 1,
    CloseRequest = 2,
    CloseResponse = 3,
    Data = 4,
    CloseDial = 5,
    Drain = 6,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Packet {
    #[prost(enumeration = "PacketType", tag = "1")]
    pub r#type: i32,
    #[prost(oneof = "Payload", tags = "2, 3, 4, 5, 6, 7, 8")]
    pub payload: Option<Payload>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Payload {
    #[prost(message, tag = "2")]
    DialRequest(DialRequest),
    #[prost(message, tag = "3")]
    DialResponse(DialResponse),
    #[prost(message, tag = "4")]
    Data(Data),
    #[prost(message, tag = "5")]
    CloseRequest(CloseRequest),
    #[prost(message, tag = "6")]
    CloseResponse(CloseResponse),
    #[prost(message, tag = "7")]
    CloseDial(CloseDial),
    #[prost(message, tag = "8")]
    Drain(Drain),
}

/// Asks for a connection.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DialRequest {
    #[prost(string, tag = "1")]
    pub protocol: String,
    /// `HOST:PORT`, an IPv6 address in brackets.
    #[prost(string, tag = "2")]
    pub address: String,
    /// Chosen by the client. The answer has the same number.
    #[prost(int64, tag = "3")]
    pub random: i64,
}

/// The answer to a [`DialRequest`]. If `error` is empty, there is a connection, whose id is `connect_id`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DialResponse {
    #[prost(string, tag = "1")]
    pub error: String,
    /// Counted from 1; 0 stands for no connection.
    #[prost(int64, tag = "2")]
    pub connect_id: i64,
    #[prost(int64, tag = "3")]
    pub random: i64,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Data {
    #[prost(int64, tag = "1")]
    pub connect_id: i64,
    #[prost(string, tag = "2")]
    pub error: String,
    #[prost(bytes = "bytes", tag = "3")]
    pub data: Bytes,
}

/// Asks to close both directions of a connection.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct CloseRequest {
    #[prost(int64, tag = "1")]
    pub connect_id: i64,
}

/// The last packet of a connection, whichever side has closed it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CloseResponse {
    #[prost(string, tag = "1")]
    pub error: String,
    #[prost(int64, tag = "2")]
    pub connect_id: i64,
}

/// Cancels a dial that has not been answered.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct CloseDial {
    #[prost(int64, tag = "1")]
    pub random: i64,
}

/// Only agents of Konnectivity send it.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Drain {}

impl Payload {
    pub fn kind(&self) -> PacketType {
        match self {
            Self::DialRequest(_) => PacketType::DialRequest,
            Self::DialResponse(_) => PacketType::DialResponse,
            Self::Data(_) => PacketType::Data,
            Self::CloseRequest(_) => PacketType::CloseRequest,
            Self::CloseResponse(_) => PacketType::CloseResponse,
            Self::CloseDial(_) => PacketType::CloseDial,
            Self::Drain(_) => PacketType::Drain,
        }
    }
}

impl From<Payload> for Packet {
    fn from(payload: Payload) -> Self {
        Self { r#type: payload.kind().into(), payload: Some(payload) }
    }
}

impl Packet {
    /// What the packet holds, if that agrees with its type. Some peers look only at the one, others only at the other.
    pub fn into_payload(self) -> Option<Payload> {
        let kind = self.r#type;
        self.payload.filter(|payload| i32::from(payload.kind()) == kind)
    }

    pub fn dial_request(random: i64, address: &str) -> Self {
        let (protocol, address) = (TCP.to_owned(), address.to_owned());
        Payload::DialRequest(DialRequest { protocol, address, random }).into()
    }

    pub fn dialled(random: i64, connect_id: i64) -> Self {
        Payload::DialResponse(DialResponse { error: String::new(), connect_id, random }).into()
    }

    pub fn dial_failed(random: i64, error: String) -> Self {
        Payload::DialResponse(DialResponse { error, connect_id: 0, random }).into()
    }

    pub fn data(connect_id: i64, data: Bytes) -> Self {
        Payload::Data(Data { connect_id, error: String::new(), data }).into()
    }

    pub fn close_request(connect_id: i64) -> Self {
        Payload::CloseRequest(CloseRequest { connect_id }).into()
    }

    /// An empty `error` means that the connection was closed regularly.
    pub fn close_response(connect_id: i64, error: String) -> Self {
        Payload::CloseResponse(CloseResponse { error, connect_id }).into()
    }

    pub fn close_dial(random: i64) -> Self {
        Payload::CloseDial(CloseDial { random }).into()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    const RANDOM: i64 = 7_188_621_719_815_055_000;

    /// The bytes were recorded from a real kube-apiserver and a real Konnectivity server.
    #[test]
    fn packets_are_those_of_konnectivity() {
        let error = "dial tcp 10.77.1.2:8081: connect: connection refused";
        let random = b"\x18\x85\xb3\xac\x8a\x9c\xcc\x90\xdd\x1f";
        let refused = [b"\x08\x01\x1a\x40\x0a\x34".as_slice(), error.as_bytes(), random].concat();
        let table: [(Packet, &[u8]); 6] = [
            (
                Packet::dial_request(RANDOM, "10.77.1.2:8080"),
                b"\x12\x1f\x0a\x03tcp\x12\x0e10.77.1.2:8080\x18\x98\xcd\xef\x91\xe0\xab\xc7\xe1\x63",
            ),
            (Packet::dialled(RANDOM, 3), b"\x08\x01\x1a\x0c\x10\x03\x18\x98\xcd\xef\x91\xe0\xab\xc7\xe1\x63"),
            (Packet::dial_failed(2_286_212_748_466_133_381, error.to_owned()), &refused),
            (Packet::data(3, Bytes::from_static(b"GET /")), b"\x08\x04\x22\x09\x08\x03\x1a\x05GET /"),
            (Packet::close_request(3), b"\x08\x02\x2a\x02\x08\x03"),
            (Packet::close_response(3, String::new()), b"\x08\x03\x32\x02\x10\x03"),
        ];
        for (packet, bytes) in table {
            assert_eq!(packet.encode_to_vec(), bytes, "{packet:?}");
            assert_eq!(Packet::decode(bytes).unwrap(), packet);
        }
        assert_eq!(Packet::close_dial(5).encode_to_vec(), b"\x08\x05\x3a\x02\x08\x05");
        let drain: Packet = Payload::Drain(Drain {}).into();
        assert_eq!(drain.encode_to_vec(), b"\x08\x06\x42\x00");
    }

    #[test]
    fn a_packet_must_hold_what_its_type_says() {
        let request = Packet::close_request(1);
        assert!(request.clone().into_payload().is_some());
        assert_eq!(Packet { r#type: PacketType::Data.into(), ..request.clone() }.into_payload(), None);
        assert_eq!(Packet { r#type: 77, ..request.clone() }.into_payload(), None);
        assert_eq!(Packet { payload: None, ..request }.into_payload(), None);
    }

    #[test]
    fn malformed_bytes_are_refused() {
        for bytes in [&b"\x12\xff\xff\xff\xff\x0f"[..], b"\x12\x05\x0a\x01\xff", b"\x22\x02\x08", b"\xff"] {
            assert!(Packet::decode(bytes).is_err(), "{bytes:?}");
        }
    }
}
