"""Every wrong function is caught, every right twin passes, and no check fails in itself."""

import pytest

import torchbp
from tests.verify import catalogue, known
from tests.verify.alarms import KNOWN
from tests.verify.compositions import composition
from tests.verify.functions import FUNCTIONS
from tests.verify.networks import network
from tests.verify.unseen import every

PAIRS = known.every()
FORWARDS, BACKWARDS = 124, 162  # calls that a right twin takes at most
MORE = {
    "three_layers_exercise_18": 138,  # eight inputs, half of them weights, masks or targets
    # More constraints than unknowns, of one unknown: no step is short enough.
    "program_symmetric_part_20": 122,
    # Points of `edges` are asked for one by one where forward refuses them together.
    "inverse_transform_start_21": 120,
}
NEED_COMPILE = {
    "compile_path_wrong",
    "graph_break",
    "lengths_fake_23",
    "quick_gelu_compiled_23",
    "row_energies_fake_30",
    "rms_layer_compiled_31",
    "packed_geglu_compiled_32",
    "tanh_square_compiled_38",
    "edit_distance_compiled_39",
    "alpha_beta_compiled_42",
}


def run(function, pair):
    skip = () if pair.name in NEED_COMPILE else ("compile",)
    reference = pair.reference if pair.needs_reference else None
    return torchbp.gradcheck(
        function, pair.make(), reference=reference, skip=skip, raise_exception=False
    )


def within_bounds(report, pair):
    """Whether gradcheck called a right function no more often than it may."""
    return report.forwards <= MORE.get(pair.name, FORWARDS) and report.backwards <= BACKWARDS


def test_there_are_enough():
    assert len(PAIRS) >= 60


ALL = [pytest.param(p, id=n) for n, p in PAIRS.items()]


@pytest.mark.parametrize("pair", ALL)
def test_wrong_function_is_caught(pair):
    report = run(pair.wrong, pair)
    assert not report, str(report)
    assert all(f.message and f.repeat for f in report.wrong)


@pytest.mark.parametrize("pair", ALL)
def test_right_twin_passes(pair):
    report = run(pair.right, pair)
    assert report, str(report)
    assert pair.name in NEED_COMPILE or within_bounds(report, pair)
    assert not [c.detail for c in report.capabilities.values() if "itself failed" in c.detail]


# Each is what one part of a check is for.
ALWAYS = {"conv_batch_chunks_7", "argmax_uint8_7", "cdist_coincident_7", "segment_max_ties_7"}
ALWAYS |= {"border_sample_7", "render_background_7", "sparsemax_squeeze_8", "smoothed_ce_sum_8"}
ALWAYS |= {"layernorm_dw_accum_11", "batchnorm_module_11", "kvcache_causal_attention_11"}
ALWAYS |= {
    "scatter_mean_11",
    "leaky_relu_9",
    "alignment_loss_9",
    "alpha_composite_9",
    "matmul_9",
    "segment_std_10",
    "grouped_heads_12",
    "scan_first_state_12",
    "planar_sign_12",
    "bias_broadcast_12",
    "box_image_12",
    "cholesky_upper_ghost_13",
    "dual_norm_rowscale_13",
    "product_second_13",
    "sinc_tiny_13",
    "added_norm_alone_20",
    "unit_rows_floor_20",
    "soft_dtw_batch_20",
    "channel_relu_places_22",
    "chain_force_flag_22",
    "log_one_less_small_22",
    "rotary_table_22",
    "scaled_broadcast_22",
    "soft_entropy_scrub_22",
    "soft_scale_batch_22",
    "sparsemax_count_22",
    "arcsinh_array_23",
    "batched_linear_dims_23",
    "circular_conjugate_23",
    "growing_wave_exit_23",
    "held_exp_writes_23",
    "layer_norm_half_23",
    "leaky_bits_order_23",
    "lengths_fake_23",
    "lookup_order_23",
    "product_tangent_23",
    "quick_gelu_compiled_23",
    "score_squeeze_23",
    "turned_strides_23",
    "crop_zeros_24",
    "growth_offset_24",
    "learned_scale_shape_24",
    "pick_negative_24",
    "row_magnitude_zero_24",
    "row_maximum_noise_24",
    "norm_weight_half_20",
    "circular_convolution_20",
    "quaternion_log_negative_20",
    "packed_mean_empty_21",
    "weighted_mean_batch_21",
    "scaled_product_memo_21",
    "discretised_logistic_top_21",
    "block_sparse_layout_21",
    "drawdown_peak_21",
    "bernoulli_logit_tail_21",
    "ragged_marks_empty_30",
    "codes_wrap_30",
    "folded_norm_cached_30",
    "cube_backward_vmap_30",
    "row_norm_half_square_30",
    "recurrent_bias_bf16_30",
    "sampled_linear_rows_31",
    "matched_pairs_cap_31",
    "k_winners_newest_31",
    "channel_slopes_half_sum_32",
    "cost_volume_static_output_32",
    "masked_patches_target_32",
    "masked_variance_padding_32",
    "centred_linear_kept_33",
    "floor_unit_equal_33",
    "token_level_count_33",
    "watched_gain_kept_33",
    "composite_opaque_34",
    "gated_norm_square_34",
    "grid_read_outside_34",
    "hsv_to_rgb_falling_21",
    "edges_groups_26",
    "leapfrog_step_12",
    "F.mse_loss of two numbers",
    "F.hinge_embedding_loss of labels that require grad",
    "qr of square matrices",
    "lu_solve, steep",
}


def some(parameters, one_in):
    """Return the parameters, all but one in ``one_in`` slow: `make mutation` runs all of them too."""
    quick = {n for k, n in enumerate(parameters) if k % one_in == 0} | ALWAYS
    return [
        pytest.param(p, id=n, marks=[] if n in quick else [pytest.mark.slow])
        for n, p in parameters.items()
    ]


@pytest.mark.parametrize("pair", some(every(), 8))
def test_once_unseen(pair):
    skip = () if pair.name in NEED_COMPILE else ("compile",)
    options = {"kwargs": pair.kwargs(), "skip": skip, "raise_exception": False}
    report = torchbp.gradcheck(pair.wrong, pair.make(), **options)
    assert bool(report) == bool(pair.missed), str(report)
    twin = torchbp.gradcheck(pair.right, pair.make(), **options)
    assert bool(twin) == (pair.name not in KNOWN), str(twin)
    assert pair.name in NEED_COMPILE or within_bounds(twin, pair)
    assert not [c.detail for c in twin.capabilities.values() if "itself failed" in c.detail]


def test_right_functions_of_torch_are_many_and_alarms_few():
    assert len(FUNCTIONS) >= 150
    assert len(KNOWN) <= 8


@pytest.mark.parametrize("name", KNOWN)
def test_alarm_has_a_reproduction_in_plain_torch(name):
    assert KNOWN[name].holds(), f"{name}: torch has mended it; take it from the list"


@pytest.mark.parametrize("function", some({n: n for n in FUNCTIONS if n not in KNOWN}, 4))
def test_function_of_torch(function):
    call, make = FUNCTIONS[function]
    report = torchbp.gradcheck(call, make(), skip=("compile",), raise_exception=False)
    assert report, str(report)
    assert not [c.detail for c in report.capabilities.values() if "itself failed" in c.detail]


@pytest.mark.filterwarnings("ignore")  # of the samples' own
def test_defects_of_torch_are_found():
    missing = set(catalogue.DEFECTS)
    for name, function, inputs in catalogue.functions(only=catalogue.DEFECTS):
        report = torchbp.gradcheck(function, inputs, skip=("compile",), raise_exception=False)
        missing -= set() if report else {name.split()[0]}
    assert not missing


# What once gave an alarm: what cancels to nothing, a choice among what nearly ties, a slope that bends.
ONCE_FALSE = (265, 331, 712, 864, 888, 1042, 1076, 1148)


@pytest.mark.parametrize("seed", [*range(40), *ONCE_FALSE])
def test_right_functions_put_together_by_lot(seed):
    made = composition(seed)
    if made is None:
        return  # shapes that do not go together
    name, function, inputs = made
    report = torchbp.gradcheck(function, inputs, skip=("compile",), raise_exception=False)
    assert report, f"{name}: {report}"


# What once gave an alarm: a row of padding, a sum in bfloat16 by torch's own, a bias that the next layer takes away.
NETWORKS = range(24)


@pytest.mark.parametrize("seed", NETWORKS)
def test_right_networks_put_together_by_lot(seed):
    made = network(seed)
    if made is None:
        return  # layers that do not go together
    module, inputs = made
    report = torchbp.gradcheck(module, inputs, skip=("compile",), raise_exception=False)
    assert report, f"{module}: {report}"
    assert not [c.detail for c in report.capabilities.values() if "itself failed" in c.detail]
