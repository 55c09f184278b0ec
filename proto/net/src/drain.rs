//! What the `drain` commands of both agents have in common: the deadline that they send to the running agent, and the
//! countdown until nothing is left.

use std::{
    io::{self, IsTerminal},
    time::{Duration, SystemTime},
};

use anyhow::bail;
use http_body_util::{BodyExt, Limited};
use hyper::body::Body;

/// The longest time until the deadline of a drain.
pub const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);
/// How often the running agent is asked what is left.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// The most bytes of a request.
const MAX_REQUEST: usize = 64;
/// Begins the line of a terminal anew.
const ANEW: &str = "\r\x1b[K";

/// Reads the deadline of a command line, for example `10m`.
pub fn parse_deadline(text: &str) -> Result<Duration, String> {
    let deadline = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if deadline > LONGEST {
        return Err(format!("at most {}", humantime::format_duration(LONGEST)));
    }
    Ok(deadline)
}

/// The body of a request to drain.
pub fn request(deadline: Duration) -> String {
    deadline.as_millis().to_string()
}

/// Reads such a body; `None` if it is not one.
pub async fn read_request<B>(body: B) -> Option<Duration>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = Limited::new(body, MAX_REQUEST).collect().await.ok()?.to_bytes();
    let milliseconds = std::str::from_utf8(&body).ok()?.parse().ok()?;
    Some(Duration::from_millis(milliseconds).min(LONGEST))
}

/// How far a drain has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub until: SystemTime,
    /// The number of streams that are left.
    pub streams: usize,
    /// The number of streams that were cut at the deadline, once that is over.
    pub cut: Option<u64>,
}

/// Asks every second what is left, and shows the countdown on a terminal. Returns the number of streams that were cut at
/// the deadline, which is `None` if all have ended before. Fails if the drain is undone.
pub async fn count_down(
    mut look: impl AsyncFnMut() -> anyhow::Result<Option<Progress>>,
) -> anyhow::Result<Option<u64>> {
    let is_terminal = io::stderr().is_terminal();
    loop {
        let progress = look().await;
        if is_terminal {
            eprint!("{ANEW}");
        }
        let Some(Progress { until, streams, cut }) = progress? else {
            bail!("the drain has been undone");
        };
        if cut.is_some() || streams == 0 {
            return Ok(cut);
        }
        if is_terminal {
            let left = until.duration_since(SystemTime::now()).unwrap_or_default();
            let left = humantime::format_duration(Duration::from_secs(left.as_secs()));
            eprint!("{} left, {left} until the deadline", count(streams));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// A number of streams in words.
pub fn count(streams: usize) -> String {
    format!("{streams} {}", if streams == 1 { "stream" } else { "streams" })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use http_body_util::Full;

    use super::*;

    #[tokio::test]
    async fn a_deadline_is_read_as_it_is_written_and_has_a_limit() {
        let read = async |text: &str| read_request(Full::<Bytes>::from(text.to_owned())).await;
        let deadline = parse_deadline("10m 7ms").unwrap();
        assert_eq!(read(&request(deadline)).await, Some(deadline));
        assert_eq!(read(&u64::MAX.to_string()).await, Some(LONGEST));
        for text in ["", "-1", "10m", &"1".repeat(MAX_REQUEST + 1)] {
            assert_eq!(read(text).await, None, "{text}");
        }
        assert!(parse_deadline("31d").is_err() && parse_deadline("soon").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn the_countdown_ends_with_the_last_stream_or_the_deadline_or_the_drain() {
        let until = SystemTime::now() + Duration::from_secs(60);
        let progress = |streams, cut| Some(Progress { until, streams, cut });
        for (last, want) in [
            (progress(0, None), Some(None)),
            (progress(3, Some(3)), Some(Some(3))),
            (progress(0, Some(0)), Some(Some(0))),
            (None, None),
        ] {
            let mut said = vec![last, progress(3, None), progress(5, None)];
            let counted = count_down(async || Ok(said.pop().unwrap())).await;
            assert_eq!(counted.ok(), want);
            assert!(said.is_empty());
        }
    }
}
