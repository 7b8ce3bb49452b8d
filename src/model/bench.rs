//! A block on the workbench: what a method may ask of the block that it works on. The walk lends it; the loop over
//! blocks stays the walk's.
//!
//! Two streams of hidden states run through the model. The *compressed* stream is what earlier, already compressed
//! blocks give; the *float* stream is what the original model gives. Methods that aim at the float model's outputs see
//! both, site by site, with everything before the site as it stands by then.

use std::borrow::Cow;
use std::ops::Range;

use burn::tensor::Tensor;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::kernels::rough_product::Precision;
use crate::kernels::{matrix, tensor, values};
use crate::matrix::Matrix;
use crate::model::arrivals::Arrivals;
use crate::model::away::Away;
use crate::model::backward::{self, Gradients, Wanted};
use crate::model::block::{Block, Linear, Parameters, Place, Site, Slot};
use crate::model::capture::{Capture, Read, Sums};
use crate::model::forward::{self, Spec};
use crate::model::hidden::Hidden;
use crate::model::holdings::Holdings;
use crate::model::loss::{SquaredError, Value, distance};
use crate::model::passage::{COMPARED, Passage};
use crate::model::progress::Progress;
use crate::model::seen::Seen;
use crate::model::{Model, Module, latent, mixture, passage};
use crate::run::Run;
use crate::weight::Weight;

/// Of this many windows one is held out of the statistics of a capture.
pub(super) const HELD_OUT: usize = 10;

/// Memory that windows which are differentiated side by side may take, in bytes.
const SIDE_BY_SIDE_BYTES: usize = 256 << 20;

/// The float stream, for recipes that need it.
#[derive(Debug)]
pub struct Streams<'a> {
    /// Input of the block in the float model.
    pub inputs: &'a Hidden,
    /// Output of the block in the float model.
    pub targets: &'a Hidden,
    /// Attention's outputs and the residual stream after attention, of the compressed and of the float stream.
    pub between: &'a mut [Between; 2],
}

/// States between the sites of a block, for all windows.
#[derive(Debug)]
pub struct Between {
    mixed: Hidden,
    joined: Hidden,
}

impl Between {
    /// Stores as large as `hidden`, of `width` columns; [`Self::fit`] makes room for what attention gives.
    ///
    /// # Errors
    /// When a temporary file cannot be made.
    pub fn new(width: usize, hidden: &Hidden, run: &Run<'_>) -> Result<Self> {
        Ok(Self { mixed: hidden.like(0, run)?, joined: hidden.like(width, run)? })
    }

    /// Makes room for attention's outputs of `width` columns.
    ///
    /// # Errors
    /// When a temporary file cannot be made.
    pub fn fit(&mut self, width: usize, hidden: &Hidden, run: &Run<'_>) -> Result<()> {
        if self.mixed.width() != width {
            // What there was goes first, so that its room serves the new one.
            self.mixed = hidden.like(0, run)?;
            self.mixed = hidden.like(width, run)?;
        }
        Ok(())
    }

    /// Keeps attention's outputs and the residual stream after attention of some windows.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn keep(&mut self, windows: Range<usize>, mixed: &Tensor<2>, joined: &Tensor<2>) -> Result<()> {
        self.mixed.put(windows.clone(), mixed)?;
        self.joined.put(windows, joined)
    }

    /// The residual stream after attention.
    pub fn joined(&self) -> &Hidden {
        &self.joined
    }
}

/// A block that is being worked on.
#[derive(Debug)]
pub struct Bench<'a> {
    /// The model.
    pub model: &'a Model<'a>,
    /// The block as it stands.
    pub block: Block,
    /// What the original block saw on the compressed stream.
    pub seen: Seen,
    /// Where tokens went in a mixture, on the compressed stream.
    pub arrivals: Option<Arrivals>,
    /// Whether every token counts for every expert.
    pub everywhere: bool,
    /// The experts that were kept, by their numbers in the checkpoint, where some were removed.
    pub kept: Option<Vec<usize>>,
    /// Weights of experts that were put away; nothing where memory has room for all of them.
    pub away: Option<Away>,
    /// The surroundings.
    pub run: &'a Run<'a>,
    /// Input of the block on the compressed stream.
    pub hidden: &'a Hidden,
    /// The original block's tensors, where somebody needs them.
    pub original: Option<Parameters>,
    /// The float stream, where somebody needs it.
    pub streams: Option<Streams<'a>>,
    /// Outputs of the first windows that the block should give.
    pub wanted: Vec<Vec<f32>>,
    /// Whether everything before the MLP is still as the last capture saw it.
    pub settled: bool,
    /// How far the work is.
    pub progress: Progress<'a>,
}

/// Judges a block's output beside the original block's and writes the gradient; gives the loss.
pub type Judge<'a> = &'a mut dyn FnMut(&[f32], &[f32], &mut [f32]) -> f64;

impl Bench<'_> {
    /// The number of the block.
    pub fn index(&self) -> usize {
        self.block.index
    }

    /// Whether calibration runs at all.
    pub fn calibrated(&self) -> bool {
        !self.hidden.is_empty()
    }

    /// A linear layer as it stands.
    pub fn linear(&mut self, slot: impl Into<Slot>) -> Option<&mut Linear> {
        self.block.linear_mut(slot.into())
    }

    /// Whether layers of the block read a site; the input of the MLP counts where experts do.
    pub fn reads(&self, site: Site) -> bool {
        self.block.linears.iter().any(|linear| linear.role.site() == site) || site == Site::Mlp
    }

    /// The experts of the block as they stand.
    pub(super) fn holdings(&self) -> Holdings<'_> {
        Holdings {
            experts: self.block.experts.as_ref(),
            away: self.away.as_ref(),
            kept: self.kept.as_deref(),
            ..Holdings::of_original(self.model, self.index(), self.original.as_ref().and_then(Parameters::experts), self.run.device)
        }
    }

    /// The passage through the block with these tensors and the experts as they stand.
    pub(super) fn passage<'s>(&'s self, parameters: &'s Parameters) -> Passage<'s> {
        Passage { model: self.model, index: self.index(), parameters, experts: self.holdings(), run: self.run }
    }

    /// The original weight of a layer; nothing where the original was not kept.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn original(&self, slot: impl Into<Slot>) -> Result<Option<Matrix>> {
        let (slot, Some(original)) = (slot.into(), &self.original) else { return Ok(None) };
        if slot.expert.is_some() {
            return self.holdings().original_weight(slot).map(Some);
        }
        Ok(original.at(slot).map(matrix))
    }

    /// The original weight of all roles of a module, one after the other.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn originals(&self, module: &Module) -> Result<Option<Matrix>> {
        let mut whole: Option<Matrix> = None;
        for &role in &module.roles {
            let Some(mut matrix) = self.original(Slot { expert: module.expert, role })? else { return Ok(None) };
            match &mut whole {
                None => whole = Some(matrix),
                Some(whole) => {
                    whole.rows += matrix.rows;
                    whole.data.append(&mut matrix.data);
                }
            }
        }
        Ok(whole)
    }

    /// The weight of a module as it stands.
    ///
    /// # Errors
    /// When the block does not have it, or it cannot be read.
    pub fn joined(&self, module: &Module) -> Result<Cow<'_, Weight>> {
        let slots = || module.roles.iter().map(|&role| Slot { expert: module.expert, role });
        let weights = slots().map(|slot| self.block.linear(slot).map(|linear| &linear.weight));
        let missing = |what: &str| Error::run(what).tensor(&module.name);
        match weights.collect::<Option<Vec<&Weight>>>().as_deref() {
            None | Some([]) => Err(missing("not part of the block")),
            Some([one]) if mixture::absent(one) => {
                let away = self.away.iter().zip(slots()).map(|(away, slot)| away.get(slot)).next().transpose()?.flatten();
                let weight = match away {
                    Some(weight) => weight,
                    None => Weight::Dense(self.originals(module)?.ok_or_else(|| missing("the original block was not kept"))?),
                };
                Ok(Cow::Owned(weight))
            }
            Some([one]) => Ok(Cow::Borrowed(one)),
            Some(several) => Ok(Cow::Owned(Weight::stacked(several))),
        }
    }

    /// The original weight of a norm.
    pub fn original_norm(&self, place: Place) -> Option<Vec<f32>> {
        self.original.as_ref()?.norm(place).map(|norm| values(norm.clone()))
    }

    /// Relative squared error of the block's output on the first windows, as it stands.
    ///
    /// # Errors
    /// When hidden states cannot be read, or an output is not finite.
    pub fn output_error(&mut self) -> Result<Option<f64>> {
        if self.wanted.is_empty() {
            return Ok(None);
        }
        let parameters = Parameters::take_own(&mut self.block, self.run.device);
        let outputs = self.passage(&parameters).of_first(self.hidden, COMPARED);
        parameters.give_back(&mut self.block);
        Ok(relative_error(&self.wanted, &outputs?))
    }

    /// The float tensors of the block as it stands, for [`Self::descend_into`]. Blocks of which no gradients are computed elsewhere lie
    /// on the processor as a whole, and so do those for which a GPU has no room: their weights would cross the bus at every step.
    ///
    /// # Errors
    /// When the weight of an expert cannot be read.
    pub fn parameters(&self) -> Result<Parameters> {
        let processor = Device::cpu();
        let device = if self.block.stays() || !self.block.fits(self.run.device) { &processor } else { self.run.device };
        let mut parameters = Parameters::copy_to_change(&self.block, device);
        if let (Some(tensors), Some(experts)) = (parameters.experts_mut(), &self.block.experts) {
            Holdings { device, ..self.holdings() }.fill(tensors, experts.shared.is_some())?;
        }
        Ok(parameters)
    }

    /// The mean squared error of a block with these tensors against the float model's output on some windows, and its
    /// gradients, which are added to `gradients`. `trim` is the share of entries with the largest errors, per window,
    /// that do not count.
    ///
    /// # Errors
    /// When hidden states cannot be read, or the streams are not there.
    pub fn descend_into(
        &self,
        parameters: &Parameters,
        windows: &[usize],
        trim: f64,
        wanted: Wanted,
        gradients: &mut Gradients,
    ) -> Result<f64> {
        let streams = self.streams.as_ref().ok_or_else(|| Error::run("the float stream was not kept"))?;
        let width = self.model.config.hidden;
        let entries: usize = windows.iter().map(|&window| self.hidden.tokens(window) * width).sum();
        let factor = 1.0 / entries as f64;
        let mut losses = Vec::new();
        for windows in windows.chunk_by(|&a, &b| self.hidden.tokens(a) == self.hidden.tokens(b)) {
            let seq = self.hidden.tokens(windows[0]);
            let spec = Spec::new(&self.model.config, self.block.index, seq);
            for windows in windows.chunks(self.side_by_side(seq)) {
                let home = parameters.home();
                let [x, target] = [self.hidden, streams.targets].map(|states| states.states_of(windows, &home));
                let dropped = ((seq * width) as f64 * trim) as usize;
                let mut judge = SquaredError { target: target?, factor, window: seq * width, dropped };
                losses.push(backward::block(&spec, parameters, &x?, wanted, gradients, &mut judge)?);
            }
        }
        // Whoever waits for the first keeps a GPU from going on with the next.
        Ok(losses.into_iter().map(Value::get).sum())
    }

    /// Windows of `seq` tokens that are differentiated side by side, where what they keep is small: as many as there are
    /// threads, or on a GPU, where every launch costs, as many as fit.
    fn side_by_side(&self, seq: usize) -> usize {
        let config = &self.model.config;
        let floats = seq * (9 * config.hidden + 8 * config.widest_mixed() + 6 * config.widest_middle());
        let most = if self.run.device.gpu.is_some() { usize::MAX } else { rayon::current_num_threads() };
        (SIDE_BY_SIDE_BYTES / (4 * floats).max(1)).clamp(1, most)
    }

    /// Runs a block with these tensors on a window of the compressed stream, beside the original block on the same
    /// inputs, lets `loss` judge both outputs (the block's, the original's, the gradient to write), and adds the gradients
    /// of the norms to `gradients`.
    ///
    /// # Errors
    /// When hidden states cannot be read, or the original block is not there.
    pub fn tweak_into(&self, parameters: &Parameters, window: usize, loss: Judge<'_>, gradients: &mut Gradients) -> Result<f64> {
        let original = self.original.as_ref().ok_or_else(|| Error::run("the original block was not kept"))?;
        let seq = self.hidden.tokens(window);
        let x = self.hidden.states(window..window + 1, &parameters.home())?;
        let reference = values(self.forward(original, seq, x.clone()));
        let spec = Spec::new(&self.model.config, self.block.index, seq);
        let wanted = Wanted { weights: false, norms: true, input: false, precision: Precision::Single };
        let mut judge = |y: &[f32], dy: &mut [f32]| loss(y, &reference, dy);
        Ok(backward::block(&spec, parameters, &x, wanted, gradients, &mut judge)?.get())
    }

    /// The mean squared error of a block with these tensors against the float model's output on some windows.
    ///
    /// # Errors
    /// When hidden states cannot be read, or the streams are not there.
    pub fn loss(&self, parameters: &Parameters, windows: &[usize]) -> Result<f64> {
        let streams = self.streams.as_ref().ok_or_else(|| Error::run("the float stream was not kept"))?;
        let (mut sum, mut entries) = (0.0, 0);
        for &window in windows {
            let home = parameters.home();
            let target = streams.targets.states(window..window + 1, &home)?;
            let x = self.hidden.states(window..window + 1, &home)?;
            let y = self.forward(parameters, self.hidden.tokens(window), x);
            entries += target.shape().num_elements();
            sum += distance(&y, &target);
        }
        Ok(sum / entries.max(1) as f64)
    }

    /// The original block's outputs for all windows with another weight of one module, each: output c of window w goes to
    /// window w · (number of weights) + c of `outputs`.
    ///
    /// # Errors
    /// When hidden states cannot be read or written, an output is not finite, or the original block is not there.
    pub fn with_others(&self, module: &Module, others: &[Matrix], outputs: &mut Hidden) -> Result<()> {
        for (number, matrix) in others.iter().enumerate() {
            let mut parameters = self.original.clone().ok_or_else(|| Error::run("the original block was not kept"))?;
            let mut rest = matrix.data.as_slice();
            for &role in &module.roles {
                let shape = self.model.shape(self.block.index, role);
                let (part, others) = rest.split_at(shape[0] * shape[1]);
                parameters.set_weight(role, tensor(part.to_vec(), shape, &self.run.device.burn));
                rest = others;
            }
            self.outputs_of(&parameters, self.holdings(), (number, others.len()), outputs)?;
        }
        Ok(())
    }

    /// As [`Self::with_others`], with other weights of experts, as they were put away.
    ///
    /// # Errors
    /// As [`Self::with_others`].
    pub fn with_other_experts(&self, others: &[Away], outputs: &mut Hidden) -> Result<()> {
        let original = self.original.as_ref().ok_or_else(|| Error::run("the original block was not kept"))?;
        for (number, away) in others.iter().enumerate() {
            self.outputs_of(original, Holdings { away: Some(away), ..self.holdings() }, (number, others.len()), outputs)?;
        }
        Ok(())
    }

    fn outputs_of(
        &self,
        parameters: &Parameters,
        experts: Holdings<'_>,
        (number, count): (usize, usize),
        outputs: &mut Hidden,
    ) -> Result<()> {
        let mut states = self.hidden.copy(self.run)?;
        Passage { experts, ..self.passage(parameters) }.advance(&mut states, None, &Progress::new(0, "", self.run))?;
        (0..states.len()).try_for_each(|window| {
            let place = window * count + number;
            outputs.put(place..place + 1, &states.states(window..window + 1, &self.run.device.burn)?)
        })
    }

    fn forward(&self, parameters: &Parameters, seq: usize, x: Tensor<2>) -> Tensor<2> {
        let spec = Spec::new(&self.model.config, self.block.index, seq);
        forward::block(&spec, parameters, x.to_device(&parameters.home()), &mut |_, _| {})
    }

    /// Both streams at a site, with everything before it as it stands: first of most windows, then of those held out
    /// (`None` with too few windows). Sites must be asked for in the order of a forward, each once.
    ///
    /// # Errors
    /// When hidden states cannot be read or written, or the streams are not there.
    pub fn capture(&mut self, site: Site) -> Result<(Capture, Option<Capture>)> {
        let parameters = Parameters::take_own(&mut self.block, self.run.device);
        let result = self.capture_with(site, &parameters);
        parameters.give_back(&mut self.block);
        result
    }

    fn capture_with(&mut self, site: Site, parameters: &Parameters) -> Result<(Capture, Option<Capture>)> {
        let streams = self.streams.take().ok_or_else(|| Error::run("the float stream was not kept"))?;
        let original = self.original.take().ok_or_else(|| Error::run("the original block was not kept"))?;
        // Where a norm follows, what is missing in the stream cannot be added to what the layer gives.
        let writes = match site {
            Site::Output => original.norm(Place::AttentionOut).is_none(),
            Site::Down => original.norm(Place::MlpOut).is_none(),
            Site::Attention | Site::QueryLatent | Site::KeyValueLatent | Site::Mlp => false,
        };
        let hold = self.hidden.len() >= HELD_OUT;
        let mut sums: [Option<Sums>; 2] = [None, None];
        let [own, other] = &mut *streams.between;
        for windows in runs(self.model, self.hidden, hold) {
            self.run.check_stop()?;
            let compressed = self.step(site, parameters, self.hidden, own, windows.clone())?;
            let float = self.float_step(site, &original, streams.inputs, other, windows.clone())?;
            let columns = compressed.site.dims()[1];
            let held = usize::from(hold && windows.start % HELD_OUT == HELD_OUT - 1);
            let rows = if writes { self.model.config.hidden } else { 0 };
            let sums = sums[held].get_or_insert_with(|| Sums::new(columns, rows, self.run.device));
            sums.add(compressed, float, self.model.config.residual_factor);
        }
        (self.streams, self.original) = (Some(streams), Some(original));
        let [most, held] = sums.map(|sums| sums.map(Sums::finish).transpose());
        let (most, held) = (most?, held?);
        let most = most.ok_or_else(|| Error::run("no calibration window was seen"))?;
        // Where the original block was not observed, this is what is known of its inputs.
        self.seen.sites.entry(site).or_insert_with(|| held.as_ref().map_or_else(|| most.clone(), |held| most.merged(held)).statistics);
        Ok((most, held))
    }

    /// Moves the compressed stream behind attention, as [`Self::capture`] of what the MLP reads does.
    ///
    /// # Errors
    /// As [`Self::capture`].
    pub(super) fn pass_attention(&mut self) -> Result<()> {
        let parameters = Parameters::take_own(&mut self.block, self.run.device);
        let mut passed = Ok(());
        if let Some(streams) = self.streams.take() {
            for windows in runs(self.model, self.hidden, false) {
                let step = self
                    .run
                    .check_stop()
                    .and_then(|()| self.step(Site::Mlp, &parameters, self.hidden, &mut streams.between[0], windows).map(drop));
                passed = passed.and(step);
            }
            self.streams = Some(streams);
        }
        parameters.give_back(&mut self.block);
        passed
    }

    /// As [`Self::step`] for the float stream, whose states the walk has kept.
    fn float_step(&self, site: Site, original: &Parameters, inputs: &Hidden, between: &mut Between, windows: Range<usize>) -> Result<Read> {
        let home = &self.run.device.burn;
        match site {
            Site::Output => Ok(Read { site: between.mixed.states(windows.clone(), home)?, stream: Some(inputs.states(windows, home)?) }),
            Site::Mlp => {
                let spec = Spec::new(&self.model.config, self.block.index, self.hidden.tokens(windows.start));
                let h = self.mlp_source(inputs, between, windows)?;
                Ok(Read { site: forward::mlp_input(&spec, original, h), stream: None })
            }
            _ => self.step(site, original, inputs, between, windows),
        }
    }

    /// What the MLP reads before its norm, of one stream for some windows.
    fn mlp_source(&self, inputs: &Hidden, between: &Between, windows: Range<usize>) -> Result<Tensor<2>> {
        let source = if self.model.config.family.places.parallel { inputs } else { &between.joined };
        source.states(windows, &self.run.device.burn)
    }

    /// Input of the site and the residual stream before it, of one stream for some windows; `between` moves on.
    fn step(&self, site: Site, parameters: &Parameters, inputs: &Hidden, between: &mut Between, windows: Range<usize>) -> Result<Read> {
        let spec = Spec::new(&self.model.config, self.block.index, self.hidden.tokens(windows.start));
        let home = &self.run.device.burn;
        Ok(match site {
            Site::Attention => {
                let x = inputs.states(windows, home)?;
                Read { site: forward::attention_input(&spec, parameters, x), stream: None }
            }
            Site::QueryLatent | Site::KeyValueLatent => {
                let x = forward::attention_input(&spec, parameters, inputs.states(windows, home)?);
                let latent = spec.config.latent.as_ref().ok_or_else(|| Error::run("attention without narrowed keys"))?;
                Read { site: latent::narrowed(&spec, latent, parameters, site, &x), stream: None }
            }
            Site::Output => {
                let x = inputs.states(windows.clone(), home)?;
                let mixed = forward::attend(&spec, parameters, x.clone(), &mut |_, _| {});
                between.mixed.put(windows, &mixed)?;
                Read { site: mixed, stream: Some(x) }
            }
            Site::Mlp => {
                let mixed = between.mixed.states(windows.clone(), home)?;
                let h = forward::join(&spec, parameters, inputs.states(windows.clone(), home)?, mixed);
                between.joined.put(windows.clone(), &h)?;
                let h = self.mlp_source(inputs, between, windows)?;
                Read { site: forward::mlp_input(&spec, parameters, h), stream: None }
            }
            Site::Down => {
                let source = self.mlp_source(inputs, between, windows.clone())?;
                let middle = forward::middle(&spec, parameters, source, &mut |_, _| {});
                Read { site: middle, stream: Some(between.joined.states(windows, home)?) }
            }
        })
    }
}

/// Runs of windows; with `hold` a run never mixes held-out windows with others.
fn runs(model: &Model<'_>, hidden: &Hidden, hold: bool) -> Vec<Range<usize>> {
    let all = passage::runs(model, hidden);
    if !hold {
        return all;
    }
    let mut cut = Vec::new();
    for run in all {
        let mut start = run.start;
        for window in run.clone() {
            let held = window % HELD_OUT == HELD_OUT - 1;
            if held {
                if start < window {
                    cut.push(start..window);
                }
                cut.push(window..window + 1);
                start = window + 1;
            }
        }
        if start < run.end {
            cut.push(start..run.end);
        }
    }
    cut
}

/// ‖before − after‖² / ‖before‖² over some windows.
pub(crate) fn relative_error(before: &[Vec<f32>], after: &[Vec<f32>]) -> Option<f64> {
    let (mut error, mut total) = (0.0, 0.0);
    for (before, after) in before.iter().flatten().zip(after.iter().flatten()) {
        error += f64::from(before - after).powi(2);
        total += f64::from(*before).powi(2);
    }
    (!before.is_empty() && total > 0.0).then(|| error / total)
}
