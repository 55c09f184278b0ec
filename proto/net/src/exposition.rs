//! Metrics as text: OpenMetrics 1.0 for scrapers that ask for it, and otherwise Prometheus' text format 0.0.4, in which a
//! counter has the name of its samples in `# TYPE`, too. A counter whose name does not end in `_total`, since another
//! program has chosen it, is of unknown type in OpenMetrics, and nothing else is.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{sync::Mutex, time::Instant};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The metrics of an agent as scrapers get them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Exposition {
    registry: Arc<Registry>,
    /// Scrapes take turns. Encoding keeps its turn even if the scraper leaves.
    turn: Arc<Mutex<Turn>>,
}

#[derive(Debug, Default)]
struct Turn {
    /// The latest text in each format, and when its encoding began.
    plain: Option<(Instant, Bytes)>,
    open_metrics: Option<(Instant, Bytes)>,
    /// When the next encoding may begin.
    rested: Option<Instant>,
}

impl Turn {
    fn latest(&mut self, open_metrics: bool) -> &mut Option<(Instant, Bytes)> {
        if open_metrics { &mut self.open_metrics } else { &mut self.plain }
    }
}

impl Exposition {
    pub fn new(registry: Registry) -> Self {
        Self { registry: Arc::new(registry), turn: Arc::default() }
    }

    /// The content type and the text for a scraper with this header `Accept`. The metrics are encoded on a thread that
    /// carries no streams, once for all who wait, and then not again for as long as it took: however often they are
    /// scraped, that takes at most half of one core. Nobody gets a text that is older than the request.
    pub async fn scrape(&self, accept: &str) -> Result<(&'static str, Bytes), fmt::Error> {
        let open_metrics = accept.contains("application/openmetrics-text");
        let content_type = if open_metrics { OPEN_METRICS } else { TEXT };
        let asked = Instant::now();
        let mut turn = self.turn.clone().lock_owned().await;
        if let Some((_, text)) = turn.latest(open_metrics).as_ref().filter(|(begun, _)| *begun >= asked) {
            return Ok((content_type, text.clone()));
        }
        if let Some(rested) = turn.rested {
            tokio::time::sleep_until(rested).await;
        }
        let registry = self.registry.clone();
        let text = tokio::task::spawn_blocking(move || {
            let begun = Instant::now();
            let mut text = String::new();
            encode(&mut text, &registry)?;
            let text = Bytes::from(if open_metrics { text } else { plain(&text) });
            turn.rested = Some(Instant::now() + begun.elapsed());
            *turn.latest(open_metrics) = Some((begun, text.clone()));
            Ok::<_, fmt::Error>(text)
        });
        Ok((content_type, text.await.map_err(|_| fmt::Error)??))
    }
}

/// Converts OpenMetrics into the text format 0.0.4.
fn plain(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            text.extend([line, "\n"]);
            continue;
        };
        match comment.split_once(' ') {
            Some(("HELP", rest)) => help = rest.split_once(' '),
            Some(("TYPE", rest)) => {
                let (name, kind) = rest.split_once(' ').unwrap_or((rest, "unknown"));
                let (ending, kind) = match kind {
                    "counter" => ("_total", kind),
                    "unknown" => ("", "counter"),
                    _ => ("", kind),
                };
                if let Some((_, help)) = help.take().filter(|(helped, _)| *helped == name) {
                    text.extend(["# HELP ", name, ending, " ", help, "\n"]);
                }
                text.extend(["# TYPE ", name, ending, " ", kind, "\n"]);
            }
            _ => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        task::{Context, Waker},
    };

    use prometheus_client::{
        encoding::EncodeMetric,
        metrics::{MetricType, counter::Counter, family::Family, gauge::ConstGauge, histogram::Histogram},
    };

    use super::*;

    #[derive(Debug)]
    struct Unknown;

    impl prometheus_client::collector::Collector for Unknown {
        fn encode(
            &self,
            mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>,
        ) -> Result<(), fmt::Error> {
            let metric = encoder.encode_descriptor("old_count", "An old name.", None, MetricType::Unknown)?;
            ConstGauge::new(3).encode(metric)
        }
    }

    fn exposition() -> Exposition {
        let mut registry = Registry::with_prefix("x");
        let family = Family::<Vec<(&str, &str)>, Counter>::default();
        family.get_or_create(&vec![("a", "# TYPE \"\n")]).inc();
        registry.register("dials", "Dials", family);
        let histogram = Histogram::new([1.0]);
        histogram.observe(0.5);
        registry.register("seconds", "Time", histogram);
        registry.register_collector(Box::new(Unknown));
        Exposition::new(registry)
    }

    #[tokio::test]
    async fn who_asks_for_open_metrics_gets_it() {
        let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2";
        let (content_type, text) = exposition().scrape(accept).await.unwrap();
        assert!(content_type.starts_with("application/openmetrics-text; version=1.0.0"));
        let text = std::str::from_utf8(&text).unwrap();
        assert!(text.contains("# TYPE x_dials counter\n") && text.ends_with("# EOF\n"), "{text}");
    }

    /// Counts how often it is encoded.
    #[derive(Debug)]
    struct Encoded(Arc<AtomicUsize>);

    impl prometheus_client::collector::Collector for Encoded {
        fn encode(
            &self,
            mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>,
        ) -> Result<(), fmt::Error> {
            let count = self.0.fetch_add(1, Ordering::Relaxed) as u64 + 1;
            let metric = encoder.encode_descriptor("encoded", "Times.", None, MetricType::Gauge)?;
            ConstGauge::new(count).encode(metric)
        }
    }

    #[tokio::test]
    async fn all_who_wait_share_the_next_text_and_nobody_gets_an_old_one() {
        let encoded = Arc::<AtomicUsize>::default();
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Encoded(encoded.clone())));
        let exposition = Exposition::new(registry);
        // Keeps the first encoding from beginning before all have asked.
        let turn = exposition.turn.clone().lock_owned().await;
        let mut scrapes: Vec<_> = (0..500).map(|_| Box::pin(exposition.scrape(""))).collect();
        for scrape in &mut scrapes {
            assert!(scrape.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        drop(turn);
        for scrape in scrapes {
            let (_, text) = scrape.await.unwrap();
            assert!(text.ends_with(b"encoded 1\n"), "{text:?}");
        }
        assert_eq!(encoded.load(Ordering::Relaxed), 1);
        for count in 2..5 {
            let (_, text) = exposition.scrape("").await.unwrap();
            assert!(text.ends_with(format!("encoded {count}\n").as_bytes()), "{text:?}");
        }
    }

    #[tokio::test]
    async fn who_leaves_meanwhile_leaves_the_turn_to_others() {
        let exposition = exposition();
        for _ in 0..3 {
            let turn = exposition.turn.clone().lock_owned().await;
            let mut leaving = Box::pin(exposition.scrape(""));
            assert!(leaving.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            drop(turn);
        }
        exposition.scrape("").await.unwrap();
    }

    #[tokio::test]
    async fn others_get_plain_text() {
        let (content_type, text) = exposition().scrape("*/*").await.unwrap();
        assert_eq!(content_type, "text/plain; version=0.0.4; charset=utf-8");
        assert_eq!(
            text,
            "# HELP x_dials_total Dials.\n# TYPE x_dials_total counter\nx_dials_total{a=\"# TYPE \\\"\\n\"} 1\n\
             # HELP x_seconds Time.\n# TYPE x_seconds histogram\nx_seconds_sum 0.5\nx_seconds_count 1\n\
             x_seconds_bucket{le=\"1.0\"} 1\nx_seconds_bucket{le=\"+Inf\"} 1\n\
             # HELP x_old_count An old name.\n# TYPE x_old_count counter\nx_old_count 3\n"
        );
    }
}
