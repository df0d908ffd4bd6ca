"""Fifteenth set: functions and faults drawn by lot, so that nobody chose which stands with which.

A list of 104 functions that people write a backward for and one of 40 kinds of fault were shuffled with
`random.Random(15)`; the first 60 functions each took the first kind in the deck that makes sense for them, what was
passed over stayed on top, and the deck was laid out again when it was used up. The deal, pair by pair:

local_attention state between calls; elman_rnn detach; rank_hinge wrong dim; length_attention None for a gradient;
spherical large values; instance_norm unused output's None grad; cosine_attention needs_input_grad order; selu dtype of
the gradient; multi_query batch, group or channel counts; gather_rows broadcast sum forgotten; heat_step last partial
block dropped; contrastive_pairs overflow in float16; autocorrelation ignored or padded entries; expectile gradient of a
scalar parameter; kronecker in-place write to an input or saved tensor; conv1d grad_output assumed contiguous;
binary_logits clamp edge; bilinear_form double backward lost; additive_attention saved output instead of input;
layer_norm_2d negative or zero values; minimal_gated a step of a recurrence off; bilinear_sample index repeated;
coo_product sign; logit epsilon; leaky_integrator mask; cosine_transform size 1; embedding_bag expanded or strided
input; segment_sum factor; hermite several outputs, one ignored; p_norm in-place write to grad_output; residual_norm
random mask; adaptive_average empty; bond_energy weights; margin_ranking smoothing or margin option; mesh_area
low-precision accumulation; max_pool ties; gram missing product-rule term; plane_rotation option changed from its
default; linear_interpolation state between calls; tanhshrink detach; attention_pooling causal edge or lengths;
load_balancing wrong dim; gaussian_bump None for a gradient; highway large values; quaternion_product needs_input_grad
order; toeplitz batch, group or channel counts; pre_emphasis dtype of the gradient; beta_density reduction='none';
discounted_returns broadcast sum forgotten; diagonal_low_rank last partial block dropped; householder overflow in
float16; segment_distance in-place write to an input or saved tensor; group_rms_norm saved output instead of input;
cosine_embedding ignored or padded entries; reglu grad_output assumed contiguous; batch_norm unused output's None grad;
von_mises gradient of a scalar parameter; nearest_upsample clamp edge; smooth_l1 negative or zero values;
sampled_product index repeated.

All functions take real tensors, those of floating point of one dtype. A factory builds a public function from its
Function, so a wrong function and its right twin have one signature and one docstring. `trigger` says where the gradient
is wrong. Under autocast every one computes in float32.
"""

from functools import wraps

import torch

from tests.verify.unseen import FIFTEENTH, pair
from tests.verify.unseen.twelfth import in_float32


def need(condition, rule):
    """Refuse what is outside of the domain."""
    if not condition:
        raise ValueError(rule)


def floating(function):
    """Return the function as it refuses complex tensors and two floating-point dtypes."""

    @wraps(function)
    def call(*args, **kwargs):
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        need(not any(t.is_complex() for t in tensors), "expected real tensors")
        dtypes = {t.dtype for t in tensors if t.is_floating_point()}
        need(len(dtypes) < 2, f"expected one floating-point dtype, got {dtypes}")
        return function(*args, **kwargs)

    return call


def add(name, factory, wrong, right, make, *, bug, trigger, kwargs=dict, missed=""):
    text = f"{bug}; shows with {trigger}"
    wrong, right = in_float32(floating(factory(wrong))), in_float32(floating(factory(right)))
    pair(f"{name}_15", wrong, right, make, text, kwargs, into=FIFTEENTH, missed=missed)
