//! Statistics for people: distributions as quantiles, and what is zero left out.
//!
//! The invariant: what can't be read as statistics is shown as it is.

use serde_json::{Value, json};

use crate::metrics::{Histogram, Snapshot};

/// Replaces the statistics of a reply, or in one, by what people can read.
pub(super) fn readable(mut reply: Value) -> Value {
    if let Some(statistics) = reply.get_mut("statistics") {
        *statistics = readable(statistics.take());
        return reply;
    }
    let Ok(statistics) = serde_json::from_value::<Snapshot>(reply.clone()) else {
        return reply;
    };
    let operations = statistics.operations.iter().map(|stats| {
        let mut row = json!({
            "operation": stats.operation,
            "requests": stats.requests,
            "errors": stats.errors,
        });
        add_quantiles(&mut row, &stats.latency);
        row
    });
    let queues = statistics.queues.iter().map(|queue| {
        let mut row = json!({ "queue": queue.queue, "requests": queue.latency.count() });
        add_quantiles(&mut row, &queue.latency);
        row
    });
    let (operations, queues): (Value, Value) = (operations.collect(), queues.collect());
    for (name, value) in [("operations", operations), ("queues", queues)] {
        if let Some(shown) = reply.get_mut(name) {
            *shown = value;
        }
    }
    if let Some(Value::Object(recoveries)) = reply.get_mut("recoveries") {
        for restarts in recoveries.values_mut().filter_map(Value::as_object_mut) {
            restarts.retain(|_, value| !value.is_object());
        }
    }
    reply
}

fn add_quantiles(row: &mut Value, latency: &Histogram) {
    let microseconds = |nanoseconds: Option<f64>| {
        nanoseconds.map_or(Value::Null, |time| format!("{:.1}", time / 1000.0).into())
    };
    row["mean_µs"] = microseconds(latency.mean());
    row["p50_µs"] = microseconds(latency.quantile(0.5));
    row["p99_µs"] = microseconds(latency.quantile(0.99));
}
