// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Writes metrics one after another.
//!
//! A name is given without the prefix `pageferry_`, without its unit, and without `_total`. The
//! encoder adds all three.

use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use std::fmt::Error;

/// The outcome of a write. It fails only if the text cannot grow.
pub(super) type Written = Result<(), Error>;

/// The metrics that are written so far.
pub(super) struct Page<'a>(DescriptorEncoder<'a>);

impl<'a> Page<'a> {
    pub(super) fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    /// An info: its labels are what it says.
    pub(super) fn info(&mut self, name: &str, help: &str, labels: &impl EncodeLabelSet) -> Written {
        self.0.encode_descriptor(name, help, None, MetricType::Info)?.encode_info(labels)
    }

    /// A gauge.
    pub(super) fn gauge(
        &mut self, name: &str, unit: Option<Unit>, help: &str, value: impl EncodeGaugeValue,
    ) -> Written {
        let mut metric = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        metric.encode_gauge(&value)
    }

    /// A gauge in seconds.
    pub(super) fn seconds(&mut self, name: &str, help: &str, micros: u64) -> Written {
        self.gauge(name, Some(Unit::Seconds), help, micros as f64 / 1e6)
    }

    /// A gauge in bytes.
    pub(super) fn bytes(&mut self, name: &str, help: &str, bytes: u64) -> Written {
        self.gauge(name, Some(Unit::Bytes), help, bytes)
    }

    /// A gauge with one value for each value of `label`.
    pub(super) fn gauges<'v, V: EncodeGaugeValue>(
        &mut self, name: &str, help: &str, label: &str,
        values: impl IntoIterator<Item = (&'v str, V)>,
    ) -> Written {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (at, value) in values {
            family.encode_family(&[(label, at)])?.encode_gauge(&value)?;
        }
        Ok(())
    }

    /// A counter with one value for each set of labels.
    pub(super) fn counters<'v, V: EncodeCounterValue, const N: usize>(
        &mut self, name: &str, unit: Option<Unit>, help: &str, labels: [&str; N],
        values: impl IntoIterator<Item = ([&'v str; N], V)>,
    ) -> Written {
        let mut family =
            self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (at, value) in values {
            let labels: [(&str, &str); N] = std::array::from_fn(|index| (labels[index], at[index]));
            family.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
        }
        Ok(())
    }

    /// A histogram in seconds, with one for each value of `label`: its sum, and its buckets.
    pub(super) fn histograms<'v, const N: usize>(
        &mut self, name: &str, help: &str, label: &str,
        values: impl IntoIterator<Item = (&'v str, f64, [(f64, u64); N])>,
    ) -> Written {
        let unit = Some(&Unit::Seconds);
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        for (at, sum, buckets) in values {
            let count = buckets.iter().map(|(_, count)| count).sum();
            family
                .encode_family(&[(label, at)])?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}
