//! How many requests each token and local user may make: a bucket that fills with time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// How many buckets are kept before the full ones are forgotten: as good as new.
const MANY: usize = 1024;

#[derive(Debug)]
pub(crate) struct Rates {
    /// Requests per second; as many again may come at once.
    per_second: u32,
    buckets: Mutex<HashMap<Arc<str>, Bucket>>,
}

#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Rates {
    pub(crate) fn new(per_second: u32) -> Self {
        Self { per_second, buckets: Mutex::default() }
    }

    /// Whether one more is allowed now.
    pub(crate) fn take(&self, who: &Arc<str>) -> bool {
        self.take_at(who, Instant::now())
    }

    fn take_at(&self, who: &Arc<str>, now: Instant) -> bool {
        let (rate, most) = (f64::from(self.per_second), f64::from(self.per_second) * 2.0);
        let fill = |bucket: &Bucket| (bucket.left + now.duration_since(bucket.at).as_secs_f64() * rate).min(most);
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MANY {
            buckets.retain(|_, bucket| fill(bucket) < most);
        }
        let bucket = buckets.entry(Arc::clone(who)).or_insert(Bucket { left: most, at: now });
        bucket.left = fill(bucket);
        bucket.at = now;
        let allowed = bucket.left >= 1.0;
        if allowed {
            bucket.left -= 1.0;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_is_let_through_and_then_the_rate() {
        let rates = Rates::new(10);
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let start = Instant::now();
        let burst = (0..100).filter(|_| rates.take_at(&a, start)).count();
        assert_eq!(burst, 20);
        assert!(rates.take_at(&b, start), "one does not count for another");
        let later = start + Duration::from_secs(1);
        assert_eq!((0..100).filter(|_| rates.take_at(&a, later)).count(), 10);
    }
}
