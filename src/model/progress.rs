//! How far the work on a block is: told to whoever watches in whole steps, as a share of all.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::run::Run;

/// Some steps of a stage that one piece of work takes.
#[derive(Debug)]
pub struct Progress<'a> {
    steps: u64,
    told: AtomicU64,
    /// What part of the work is being done.
    part: [f64; 2],
    note: String,
    run: &'a Run<'a>,
}

impl<'a> Progress<'a> {
    /// Work of so many steps.
    pub fn new(steps: usize, note: &str, run: &'a Run<'a>) -> Self {
        Self { steps: steps as u64, told: AtomicU64::new(0), part: [0.0, 1.0], note: note.into(), run }
    }

    /// From here on [`Self::within`] is told of the work from one share of the whole to another.
    pub fn part(&mut self, from: f64, to: f64) {
        self.part = [from, to];
        self.within(0.0);
    }

    /// Leaves the first share of the present part to what follows; gives the rest of it, for [`Self::part`].
    pub fn split(&mut self, share: f64) -> [f64; 2] {
        let [from, to] = self.part;
        let middle = (to - from).mul_add(share, from);
        self.part = [from, middle];
        [middle, to]
    }

    /// So large a share of the present part is done.
    pub fn within(&self, share: f64) {
        let [from, to] = self.part;
        let now = (((to - from).mul_add(share.clamp(0.0, 1.0), from)) * self.steps as f64).round() as u64;
        let told = self.told.fetch_max(now, Ordering::Relaxed);
        if now > told {
            self.run.observer.step(now - told, &self.note);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;

    use super::*;
    use crate::device::Device;
    use crate::run::Observer;

    struct Counting(Mutex<Vec<u64>>);

    impl Observer for Counting {
        fn step(&self, steps: u64, _: &str) {
            self.0.lock().unwrap().push(steps);
        }
    }

    #[test]
    fn all_steps_are_told_once_and_never_back() {
        let (counting, device) = (Counting(Mutex::default()), Device::cpu());
        let run = Run { device: &device, seed: 0, observer: &counting, scratch: Path::new("/tmp") };
        let mut progress = Progress::new(10, "block 0", &run);
        progress.part(0.0, 0.5);
        [0.4, 0.2, 1.0].into_iter().for_each(|share| progress.within(share));
        progress.part(0.5, 1.0);
        progress.within(0.5);
        progress.within(7.0);
        drop(progress);
        assert_eq!(*counting.0.lock().unwrap(), [2, 3, 3, 2]);
    }
}
