//! Metrics as text, for whoever scrapes: OpenMetrics 1.0 for those who ask for it, else the text format 0.0.4, in
//! which a counter's name in its `# TYPE` is that of its samples.

use std::{fmt, sync::Arc};

use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::sync::Mutex;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What is scraped. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Exposition {
    registry: Arc<Registry>,
    /// Scrapes take turns, so that they never use more than one core. Whoever leaves meanwhile leaves the turn to the work.
    turn: Arc<Mutex<()>>,
}

impl Exposition {
    pub fn new(registry: Registry) -> Self {
        Self { registry: Arc::new(registry), turn: Arc::default() }
    }

    /// Content type and text, for a scraper with this header `Accept`. The work is done beside the tasks that carry
    /// streams.
    pub async fn scrape(&self, accept: &str) -> Result<(&'static str, String), fmt::Error> {
        let open_metrics = accept.contains("application/openmetrics-text");
        let registry = self.registry.clone();
        let turn = self.turn.clone().lock_owned().await;
        let text = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let mut text = String::new();
            encode(&mut text, &registry)?;
            Ok(if open_metrics { (OPEN_METRICS, text) } else { (TEXT, plain(&text)) })
        });
        text.await.map_err(|_| fmt::Error)?
    }
}

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
                    "unknown" => ("", "untyped"),
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
        assert!(text.contains("# TYPE x_dials counter\n") && text.ends_with("# EOF\n"), "{text}");
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
             # HELP x_old_count An old name.\n# TYPE x_old_count untyped\nx_old_count 3\n"
        );
    }
}
