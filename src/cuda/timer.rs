//! Device time of each launch: a pair of events around it, in passes that run without gaps.
//!
//! A pass, a step or a token, is held on the device until the host has launched all of it: an event that finds the stream
//! idle would stand before its kernel by the time of a launch. Events keep kernels apart that would overlap otherwise
//! (programmatic dependent launch), so that each shows what it takes alone; all of them together may take longer than
//! the pass does without.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaEvent, DriverError};

use super::CudaDevice;
use super::device::driver_error;
use super::ops::{Gate, StepCounts};
use crate::range::{Range, range};
use crate::timings::{Profile, Stage, Totals, Work};
use crate::{Error, Result};

/// Launches of nothing that are timed, of which the median counts.
const EMPTY_LAUNCHES: usize = 32;

/// A kind of launch.
#[derive(Clone, Copy, PartialEq)]
struct Kernel {
    name: &'static str,
    role: &'static str,
    max_rows: usize,
    work: Work,
}

/// A launch that has run.
struct Launch {
    /// Index in the timer's kernels.
    kernel: usize,
    /// Index in its passes.
    pass: usize,
    ms: f32,
}

/// The launches of some passes.
pub(super) struct Timer {
    gate: Gate,
    kernels: Vec<Kernel>,
    launches: Vec<Launch>,
    /// Their stages and lengths; the lengths of reading steps are known in the end.
    passes: Vec<(Stage, Option<usize>)>,
    /// Start and end, of as many launches as the longest pass had so far.
    events: Vec<[CudaEvent; 2]>,
    /// Kernels of the pass that is being launched, by the pairs of events.
    open: Vec<usize>,
    /// The first failure of an event.
    failed: Option<DriverError>,
    empty_launch_us: f64,
}

fn failed(error: DriverError) -> Error {
    driver_error("timing a launch", error)
}

impl Timer {
    fn new(device: &CudaDevice) -> Result<Timer> {
        let events = (0..EMPTY_LAUNCHES).map(|_| event_pair(device)).collect::<std::result::Result<_, _>>();
        let events: Vec<[CudaEvent; 2]> = events.map_err(failed)?;
        let mut gate = Gate::new(device)?;
        // The first launch loads the kernel.
        device.launch_nothing()?;
        device.hold(&mut gate)?;
        for [start, end] in &events {
            start.record(device.stream()).map_err(failed)?;
            device.launch_nothing()?;
            end.record(device.stream()).map_err(failed)?;
        }
        gate.release();
        let times = events.iter().map(|[start, end]| start.elapsed_ms(end)).collect::<std::result::Result<_, _>>();
        let mut times: Vec<f32> = times.map_err(failed)?;
        times.sort_by(f32::total_cmp);
        Ok(Timer {
            gate,
            kernels: Vec::new(),
            launches: Vec::new(),
            passes: Vec::new(),
            events,
            open: Vec::new(),
            failed: None,
            empty_launch_us: times[EMPTY_LAUNCHES / 2] as f64 * 1e3,
        })
    }

    /// Stands before a launch of `kernel`.
    fn start(&mut self, device: &CudaDevice, kernel: Kernel) -> std::result::Result<(), DriverError> {
        if self.open.len() == self.events.len() {
            self.events.push(event_pair(device)?);
        }
        self.events[self.open.len()][0].record(device.stream())?;
        let known = self.kernels.iter().position(|known| *known == kernel);
        self.open.push(known.unwrap_or_else(|| {
            self.kernels.push(kernel);
            self.kernels.len() - 1
        }));
        Ok(())
    }

    /// Stands behind the launch that was started last.
    fn end(&mut self, device: &CudaDevice) -> std::result::Result<(), DriverError> {
        self.events[self.open.len() - 1][1].record(device.stream())
    }

    /// Waits for the pass and takes its times.
    fn harvest(&mut self) -> std::result::Result<(), DriverError> {
        let pass = self.passes.len() - 1;
        for (kernel, [start, end]) in self.open.drain(..).zip(&self.events) {
            self.launches.push(Launch { kernel, pass, ms: start.elapsed_ms(end)? });
        }
        Ok(())
    }

    /// What was timed; `steps` are the reading steps.
    pub(super) fn profile(self, steps: &[StepCounts]) -> Profile {
        let mut steps = steps.iter();
        // Rows that are computed, and those before them.
        let of_step = |step: &StepCounts| (step.tokens - step.reused_tokens, step.reused_tokens);
        let lengths: Vec<(usize, usize)> = self
            .passes
            .iter()
            .map(|(_, tokens)| tokens.map(|tokens| (tokens, 0)).or_else(|| steps.next().map(of_step)).unwrap_or((0, 0)))
            .collect();
        let mut totals = Totals::default();
        for Launch { kernel, pass, ms } in self.launches {
            let Kernel { name, role, max_rows, work } = self.kernels[kernel];
            // Question rows are fewer than those computed, and all of them live.
            let (rows, before) = (lengths[pass].0.min(max_rows), lengths[pass].1);
            let name = [name, role].join(" ");
            let (bytes, flops) = (work.bytes(rows, before), work.flops(rows, before));
            totals.add(self.passes[pass].0, name.trim_end(), ms.into(), bytes, flops);
        }
        Profile { operations: totals.into_operations(), empty_launch_us: Some(self.empty_launch_us) }
    }
}

fn event_pair(device: &CudaDevice) -> std::result::Result<[CudaEvent; 2], DriverError> {
    let event = || device.stream().context().new_event(Some(CU_EVENT_DEFAULT));
    Ok([event()?, event()?])
}

/// A launch in its range, and between its events if launches are timed.
pub(super) struct Launching<'a> {
    device: &'a CudaDevice,
    timed: bool,
    _range: Range,
}

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        if let Some(timer) = &mut *lock(&self.device.timer)
            && self.timed
            && let Err(error) = timer.end(self.device)
        {
            timer.failed.get_or_insert(error);
        }
    }
}

fn lock(timer: &Mutex<Option<Timer>>) -> MutexGuard<'_, Option<Timer>> {
    timer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaDevice {
    /// What a kernel is launched in: it lasts from here to the value's drop. `role` tells launches of one kernel apart and
    /// may be empty; `work` is that of its live rows, at most `max_rows`.
    pub(super) fn kernel(&self, name: &'static str, role: &'static str, max_rows: usize, work: Work) -> Launching<'_> {
        let range = match role {
            "" => range!("{name}"),
            _ => range!("{name} {role}"),
        };
        let mut timed = false;
        if let Some(timer) = &mut *lock(&self.timer)
            && timer.failed.is_none()
        {
            let started = timer.start(self, Kernel { name, role, max_rows, work });
            timed = started.is_ok();
            timer.failed = started.err();
        }
        Launching { device: self, timed, _range: range }
    }

    /// Runs `launches`, a pass over `tokens` tokens; `None` for a reading step, whose length the device decides.
    pub(super) fn pass(
        &self,
        stage: Stage,
        tokens: Option<usize>,
        launches: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if let Some(timer) = &mut *lock(&self.timer) {
            timer.passes.push((stage, tokens));
            self.hold(&mut timer.gate)?;
        }
        // They lock the timer themselves, one by one.
        let launched = launches();
        let mut timer = lock(&self.timer);
        let Some(timer) = timer.as_mut() else { return launched };
        timer.gate.release();
        launched?;
        let harvested = timer.harvest();
        match timer.failed.take() {
            Some(error) => Err(failed(error)),
            None => harvested.map_err(failed),
        }
    }

    /// Times all passes from here to [`CudaDevice::stop_timer`].
    pub(super) fn start_timer(&self) -> Result<()> {
        let timer = Timer::new(self)?;
        *lock(&self.timer) = Some(timer);
        Ok(())
    }

    /// The timer, if one was started.
    pub(super) fn stop_timer(&self) -> Option<Timer> {
        lock(&self.timer).take()
    }
}
