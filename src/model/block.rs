//! One decoder block: its linear layers by role, its norms by place, and the tensors that a forward needs of them.

use std::sync::{Arc, OnceLock};

use burn::tensor::Tensor;

use crate::device::{Buffer, Device, Gpu};
use crate::kernels::{Floats, tensor, values};
use crate::matrix::Matrix;
use crate::model::delta::Delta;
use crate::model::mixture::{self, Experts, Tensors, Which};
use crate::weight::{Sparse, Weight};

/// What a linear layer does in its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Queries of latent attention, narrowed.
    QueryDown,
    /// Queries of latent attention, from what was narrowed.
    QueryUp,
    /// Keys and values of latent attention, narrowed, and the columns of keys that turn.
    KeyValueDown,
    /// Keys and values of latent attention, from what was narrowed.
    KeyValueUp,
    /// Queries, keys and values of a delta rule, and what opens its output where that is in the same layer.
    DeltaIn,
    /// What opens the output of a delta rule, where it is a layer of its own.
    DeltaGate,
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Output of attention.
    Output,
    /// Gate of the MLP.
    Gate,
    /// Up projection of the MLP.
    Up,
    /// Down projection of the MLP.
    Down,
}

impl Role {
    /// All roles in the order of a forward.
    pub const ALL: [Self; Self::COUNT] = [
        Self::QueryDown,
        Self::QueryUp,
        Self::KeyValueDown,
        Self::KeyValueUp,
        Self::DeltaIn,
        Self::DeltaGate,
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Those of a block of plain attention and a plain MLP.
    pub const PLAIN: [Self; 7] = [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];

    /// How many there are.
    pub const COUNT: usize = 13;

    /// Name inside a block, as most families have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::QueryDown => "self_attn.q_a_proj",
            Self::QueryUp => "self_attn.q_b_proj",
            Self::KeyValueDown => "self_attn.kv_a_proj_with_mqa",
            Self::KeyValueUp => "self_attn.kv_b_proj",
            Self::DeltaIn => "linear_attn.in_proj_qkv",
            Self::DeltaGate => "linear_attn.in_proj_z",
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Which of the configuration's flags speaks of its bias: 0 queries, keys and values, 1 output, 2 MLP.
    pub fn bias_class(self) -> Option<usize> {
        match self {
            Self::Query | Self::Key | Self::Value | Self::QueryDown | Self::KeyValueDown => Some(0),
            Self::Output => Some(1),
            Self::Gate | Self::Up | Self::Down => Some(2),
            Self::QueryUp | Self::KeyValueUp | Self::DeltaIn | Self::DeltaGate => None,
        }
    }

    /// The input that the layer reads.
    pub fn site(self) -> Site {
        match self {
            Self::QueryUp => Site::QueryLatent,
            Self::KeyValueUp => Site::KeyValueLatent,
            Self::Query | Self::Key | Self::Value | Self::QueryDown | Self::KeyValueDown | Self::DeltaIn | Self::DeltaGate => {
                Site::Attention
            }
            Self::Output => Site::Output,
            Self::Gate | Self::Up => Site::Mlp,
            Self::Down => Site::Down,
        }
    }
}

/// An input that one or more linear layers read; statistics hang on sites, not on matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// Read by queries, keys and values.
    Attention,
    /// Read by queries from what was narrowed.
    QueryLatent,
    /// Read by keys and values from what was narrowed.
    KeyValueLatent,
    /// Read by the output projection of attention.
    Output,
    /// Read by gate and up.
    Mlp,
    /// Read by down.
    Down,
}

impl Site {
    /// All sites in the order of a forward.
    pub const ALL: [Self; 6] = [Self::Attention, Self::QueryLatent, Self::KeyValueLatent, Self::Output, Self::Mlp, Self::Down];
}

/// A place for a norm in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// Before attention.
    AttentionIn,
    /// After attention.
    AttentionOut,
    /// Before the MLP.
    MlpIn,
    /// After the MLP.
    MlpOut,
    /// Of the queries.
    Query,
    /// Of the keys.
    Key,
    /// Of narrowed queries.
    QueryLatent,
    /// Of narrowed keys and values.
    KeyValueLatent,
}

impl Place {
    /// All places, each at the index that is its value.
    pub const ALL: [Self; Self::COUNT] =
        [Self::AttentionIn, Self::AttentionOut, Self::MlpIn, Self::MlpOut, Self::Query, Self::Key, Self::QueryLatent, Self::KeyValueLatent];

    /// How many there are.
    pub const COUNT: usize = 8;
}

/// Which linear layer of a block: one of its own, or of one of its experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// The expert.
    pub expert: Option<Which>,
    /// What it does.
    pub role: Role,
}

impl Slot {
    /// A layer of an expert.
    pub fn of(which: Which, role: Role) -> Self {
        Self { expert: Some(which), role }
    }
}

impl From<Role> for Slot {
    fn from(role: Role) -> Self {
        Self { expert: None, role }
    }
}

/// A linear layer: y = x Wᵀ + b.
#[derive(Debug)]
pub struct Linear {
    /// Full name without `.weight`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Its weight, `[outputs, inputs]`.
    pub weight: Weight,
    /// Its bias.
    pub bias: Option<Vec<f32>>,
    /// The floats of its weight on a GPU, once they were needed there; gone when the layer may change.
    there: OnceLock<Tensor<2>>,
}

impl Linear {
    /// A layer of which nothing lies on a GPU yet.
    pub fn new(name: String, role: Role, weight: Weight, bias: Option<Vec<f32>>) -> Self {
        Self { name, role, weight, bias, there: OnceLock::new() }
    }

    fn floats_on(&self, place: &burn::tensor::Device) -> Tensor<2> {
        tensor(self.weight.to_matrix().into_owned().data, self.weight.shape(), place)
    }
}

/// The weight of a norm as it is stored.
#[derive(Debug)]
pub struct Norm {
    /// Full name of the tensor.
    pub name: String,
    /// Where it stands.
    pub place: Place,
    /// Its weight.
    pub weight: Vec<f32>,
}

/// A decoder block.
#[derive(Debug)]
pub struct Block {
    /// Its number.
    pub index: usize,
    /// Its linear layers, those of experts aside.
    pub linears: Vec<Linear>,
    /// The experts of a block whose MLP is a mixture.
    pub experts: Option<Experts>,
    /// What a delta rule has beside its linear layers, in a block that has one.
    pub delta: Option<Delta>,
    /// By head, the score of nothing in attention.
    pub sinks: Option<Vec<f32>>,
    /// Its norms.
    pub norms: Vec<Norm>,
}

impl Block {
    /// A layer.
    pub fn linear(&self, slot: Slot) -> Option<&Linear> {
        let own = match slot.expert {
            None => self.linears.as_slice(),
            Some(which) => self.experts.as_ref()?.layers(which)?,
        };
        own.iter().find(|linear| linear.role == slot.role)
    }

    /// As [`Self::linear`], to change it.
    pub fn linear_mut(&mut self, slot: Slot) -> Option<&mut Linear> {
        let own = match slot.expert {
            None => self.linears.as_mut_slice(),
            Some(which) => self.experts.as_mut()?.layers_mut(which)?,
        };
        let linear = own.iter_mut().find(|linear| linear.role == slot.role)?;
        linear.there = OnceLock::new();
        Some(linear)
    }

    /// Which of its own layers have room on the GPU of a device, one after the other.
    fn fit(&self, device: &Device) -> Vec<bool> {
        let mut room = device.room_for_weights();
        let fits = |linear: &Linear| {
            let [rows, columns] = linear.weight.shape();
            let bytes = 4 * (rows * columns) as u64;
            let fits = device.gpu.is_some() && bytes <= room && device.binds(bytes);
            room -= if fits { bytes } else { 0 };
            fits
        };
        self.linears.iter().map(fits).collect()
    }

    /// Whether all its own layers have room on the GPU of a device, if it has one.
    pub fn fits(&self, device: &Device) -> bool {
        device.gpu.is_none() || self.fit(device).into_iter().all(|fits| fits)
    }

    /// Copies the weights that have room there to the GPU of a device, where [`Parameters::copy`] finds them.
    pub fn send(&self, device: &Device) {
        for (linear, _) in self.linears.iter().zip(self.fit(device)).filter(|(_, fits)| *fits) {
            linear.there.get_or_init(|| linear.floats_on(&device.burn));
        }
    }

    /// The slots of all layers, those of experts last.
    pub fn slots(&self) -> Vec<Slot> {
        let own = self.linears.iter().map(|linear| Slot::from(linear.role));
        let of_experts = self.experts.iter().flat_map(Experts::linears);
        own.chain(of_experts.flat_map(|(which, linears)| linears.iter().map(move |linear| Slot::of(which, linear.role)))).collect()
    }

    /// Whether the block holds the weights of all its experts, none lying elsewhere.
    pub fn is_whole(&self) -> bool {
        let mut experts = self.experts.iter().flat_map(Experts::linears).flat_map(|(_, linears)| linears);
        experts.all(|linear| !mixture::absent(&linear.weight))
    }

    /// Whether its gradients are computed on the processor alone.
    pub fn stays(&self) -> bool {
        self.experts.is_some() || self.delta.is_some()
    }
}

/// The tensors that a forward needs.
#[derive(Debug, Clone, Default)]
pub struct Parameters {
    weights: [Option<Tensor<2>>; Role::COUNT],
    biases: [Option<Tensor<1>>; Role::COUNT],
    norms: [Option<Tensor<1>>; Place::COUNT],
    experts: Option<Tensors>,
    delta: Option<Arc<Delta>>,
    sinks: Option<Arc<[f32]>>,
}

/// The floats of a weight, without a copy where it holds floats: those are gone from it then.
pub fn floats(weight: &mut Weight) -> Vec<f32> {
    match weight {
        Weight::Dense(matrix) | Weight::Sparse(Sparse { matrix, .. }) => std::mem::take(&mut matrix.data),
        other => other.to_matrix().into_owned().data,
    }
}

impl Parameters {
    /// The weight of a role.
    ///
    /// # Panics
    /// When the block has no such layer.
    pub fn weight(&self, role: Role) -> &Tensor<2> {
        self.weights[role as usize].as_ref().unwrap_or_else(|| panic!("a block without {}", role.name()))
    }

    /// The roles that the block has layers of, in the order of a forward.
    pub fn roles(&self) -> impl Iterator<Item = Role> + '_ {
        Role::ALL.into_iter().filter(|&role| self.has(role))
    }

    /// Whether the block has a layer of a role.
    pub fn has(&self, role: Role) -> bool {
        self.weights[role as usize].is_some()
    }

    /// The weight of a layer, where the block has it.
    pub fn at(&self, slot: Slot) -> Option<&Tensor<2>> {
        match slot.expert {
            None => self.weights[slot.role as usize].as_ref(),
            Some(which) => self.experts.as_ref()?.weight(which, slot.role),
        }
    }

    fn at_mut(&mut self, slot: Slot) -> Option<&mut Tensor<2>> {
        match slot.expert {
            None => self.weights[slot.role as usize].as_mut(),
            Some(which) => self.experts.as_mut()?.layers_mut(which)?.weights.get_mut(mixture::place(slot.role)?),
        }
    }

    /// The bias of a role, where there is one.
    pub fn bias(&self, role: Role) -> Option<&Tensor<1>> {
        self.biases[role as usize].as_ref()
    }

    /// The weight of a norm, where there is one.
    pub fn norm(&self, place: Place) -> Option<&Tensor<1>> {
        self.norms[place as usize].as_ref()
    }

    /// The experts of a block whose MLP is a mixture.
    pub fn experts(&self) -> Option<&Tensors> {
        self.experts.as_ref()
    }

    /// What a delta rule has beside its linear layers.
    pub fn delta(&self) -> Option<&Arc<Delta>> {
        self.delta.as_ref()
    }

    /// By head, the score of nothing in attention.
    pub fn sinks(&self) -> Option<&[f32]> {
        self.sinks.as_deref()
    }

    /// As [`Self::experts`], to change them.
    pub fn experts_mut(&mut self) -> Option<&mut Tensors> {
        self.experts.as_mut()
    }

    /// Sets the weight of a role.
    pub fn set_weight(&mut self, role: Role, weight: Tensor<2>) {
        self.weights[role as usize] = Some(weight);
    }

    /// Sets the bias of a role.
    pub fn set_bias(&mut self, role: Role, bias: Tensor<1>) {
        self.biases[role as usize] = Some(bias);
    }

    /// Sets the weight of a norm.
    pub fn set_norm(&mut self, place: Place, weight: Tensor<1>) {
        self.norms[place as usize] = Some(weight);
    }

    /// The same tensors for automatic differentiation, which keeps gradients of weights and of norms where those are wanted.
    pub fn tracked(&self, weights: bool, norms: bool) -> Self {
        let vector = |tensor: &Option<Tensor<1>>, keep: bool| tensor.clone().map(|tensor| tensor.autodiff().set_require_grad(keep));
        Self {
            weights: self.weights.each_ref().map(|weight| weight.clone().map(|weight| weight.autodiff().set_require_grad(weights))),
            biases: self.biases.each_ref().map(|bias| vector(bias, false)),
            norms: self.norms.each_ref().map(|norm| vector(norm, norms)),
            experts: self.experts.clone(),
            delta: self.delta.clone(),
            sinks: self.sinks.clone(),
        }
    }

    /// Takes the floats out of a block, without a copy where the block holds floats; [`Self::give_back`] returns those of its own
    /// layers. For a GPU the block keeps them. Experts are taken where the block holds all of them.
    pub fn take(block: &mut Block, device: &Device) -> Self {
        let mut parameters = Self::take_own(block, device);
        if let Some(experts) = &mut block.experts {
            let place = if experts.bytes() <= device.room_for_weights() { device.burn.clone() } else { burn::tensor::Device::flex() };
            parameters.experts = Some(Tensors::take(experts, &place));
        }
        parameters
    }

    /// As [`Self::take`], of experts nothing but their router.
    pub fn take_own(block: &mut Block, device: &Device) -> Self {
        if device.gpu.is_some() {
            return Self::copy(block, device);
        }
        let mut parameters = Self::frame(block, &device.burn);
        for linear in &mut block.linears {
            let shape = linear.weight.shape();
            parameters.set_weight(linear.role, tensor(floats(&mut linear.weight), shape, &device.burn));
        }
        parameters
    }

    /// Writes a new weight of a layer, `[outputs, inputs]` as before, into the memory of the old one.
    ///
    /// # Panics
    /// When the block has no such layer.
    pub fn refill(&mut self, slot: Slot, fill: impl FnOnce(&mut [f32])) {
        let place = self.at_mut(slot).unwrap_or_else(|| panic!("a block without {slot:?}"));
        let (shape, device) = (place.dims(), place.device());
        let old = std::mem::replace(place, Tensor::zeros([1, 1], &device));
        // What lies elsewhere is not fetched to be overwritten.
        let mut memory = if Floats::of(&old).is_some() { values(old) } else { vec![0.0; shape[0] * shape[1]] };
        fill(&mut memory);
        *place = tensor(memory, shape, &device);
    }

    /// Sets the weight of a role to floats that lie on a GPU, `[outputs, inputs]` as before.
    pub fn set_weight_buffer(&mut self, role: Role, gpu: &Gpu, floats: Buffer) {
        let shape = self.weight(role).dims();
        self.set_weight(role, gpu.tensor(floats, shape));
    }

    /// Sets the weight of a norm from floats.
    pub fn set_norm_floats(&mut self, place: Place, weight: &[f32]) {
        let device = self.norm(place).map_or_else(|| self.weight(Role::Output).device(), Tensor::device);
        self.set_norm(place, tensor(weight.to_vec(), [weight.len()], &device));
    }

    /// All but the linear layers: norms, biases, and the router of a mixture.
    pub fn frame(block: &Block, device: &burn::tensor::Device) -> Self {
        let (delta, sinks) = (block.delta.clone().map(Arc::new), block.sinks.as_deref().map(Arc::from));
        let experts = block.experts.as_ref().map(|experts| Tensors::frame(experts, device));
        let mut parameters = Self { delta, sinks, experts, ..Self::default() };
        for linear in &block.linears {
            parameters.biases[linear.role as usize] = linear.bias.as_ref().map(|bias| tensor(bias.clone(), [bias.len()], device));
        }
        for norm in &block.norms {
            parameters.set_norm(norm.place, tensor(norm.weight.clone(), [norm.weight.len()], device));
        }
        parameters
    }

    /// A copy of the floats of a block, of experts nothing but their router. Weights for which the GPU has no room, or no binding,
    /// lie on the processor; those that lie on the GPU are copied there once and then shared.
    pub fn copy(block: &Block, device: &Device) -> Self {
        Self::copied(block, device, true)
    }

    /// As [`Self::copy`]; what is copied anew is not kept for others.
    pub fn copy_to_change(block: &Block, device: &Device) -> Self {
        Self::copied(block, device, false)
    }

    fn copied(block: &Block, device: &Device, keep: bool) -> Self {
        let mut parameters = Self::frame(block, &device.burn);
        for (linear, fits) in block.linears.iter().zip(block.fit(device)) {
            let there = || linear.floats_on(&device.burn);
            let weight = match (fits, keep) {
                (false, _) => linear.floats_on(&burn::tensor::Device::flex()),
                (true, true) => linear.there.get_or_init(there).clone(),
                (true, false) => linear.there.get().cloned().unwrap_or_else(there),
            };
            parameters.set_weight(linear.role, weight);
        }
        parameters
    }

    /// The device on which hidden states are computed: where the norms lie, or else the weights.
    pub fn home(&self) -> burn::tensor::Device {
        self.norms.iter().flatten().next().map_or_else(|| self.weight(Role::Output).device(), Tensor::device)
    }

    /// Whether every weight lies elsewhere than on the processor.
    pub fn elsewhere(&self) -> bool {
        self.weights.iter().flatten().all(|weight| Floats::of(weight).is_none())
    }

    /// Puts the floats of a block's own layers back where [`Self::take`] took them from. Experts stay without floats: whoever needs
    /// those has them of the original.
    pub fn give_back(mut self, block: &mut Block) {
        for linear in &mut block.linears {
            if let Weight::Dense(matrix) | Weight::Sparse(Sparse { matrix, .. }) = &mut linear.weight
                && matrix.data.is_empty()
            {
                let floats = self.weights[linear.role as usize].take().map(values).unwrap_or_default();
                *matrix = Matrix::new(matrix.rows, matrix.columns, floats);
            }
        }
    }
}
