"""Tests the parameter counts of every model of the papers, from the shapes of the real models.

The expected counts come from a separate counter, which was written from the hyper-parameters in the
papers. It counts no biases, two norms per layer and one at the end, and both embeddings unless they
are tied. The counts are also compared with the claims of the papers, which the configs contain.
"""

import functools

import pytest

from moe_jax import accounts

pytestmark = pytest.mark.unit

# The "tolerance" of a claim that contradicts the hyper-parameters of its own paper. The note of the
# config says why.
WRONG = "wrong"
# The parameters that the counter leaves out; see `left_out`.
BIAS, NORMS, EXTRA, BALANCE = "relative bias", "norms", "norms of extra FFNs", "balancing bias"
GSHARD = GLAM = (BIAS, NORMS)
T5 = (BIAS,)
# Each row has the config, the counter's number of all parameters and of activated parameters, what
# the counter leaves out, and the relative tolerances of the paper's claims of all and of activated
# parameters. None means that there is no such claim.
TABLE = [
  ("gshard:600b", 619_366_318_080, 1_495_007_232, GSHARD, 0.07, None),
  ("gshard:200b", 206_520_975_360, 563_871_744, GSHARD, 0.07, None),
  ("gshard:150b", 155_481_538_560, 1_466_695_680, GSHARD, 0.07, None),
  ("gshard:50b", 51_892_715_520, 554_434_560, GSHARD, 0.07, None),
  ("gshard:37b", 39_510_343_680, 1_459_617_792, GSHARD, 0.07, None),
  ("gshard:12_5b", 13_235_650_560, 552_075_264, GSHARD, 0.07, None),
  ("gshard:1t", 1_032_211_660_800, 2_426_142_720, GSHARD, 0.07, None),
  ("t5:base", 222_902_784, 222_902_784, T5, 0.01, None),
  ("t5:large", 737_667_072, 737_667_072, T5, 0.01, None),
  ("t5:large_geglu", 750_249_984, 750_249_984, T5, 0.02, None),
  ("t5:xxl", 11_135_328_256, 11_135_328_256, T5, 0.02, None),
  ("switch:base_16e", 1_072_396_800, 223_050_240, T5, 0.03, None),
  ("switch:base_32e", 1_978_513_920, 223_197_696, T5, 0.02, None),
  ("switch:base_64e", 3_790_748_160, 223_492_608, T5, 0.01, None),
  ("switch:base_128e", 7_415_216_640, 224_082_432, T5, 0.002, None),
  ("switch:base_256e", 14_664_153_600, 225_262_080, T5, 0.005, None),
  ("switch:large_128e", 26_309_289_984, 740_812_800, T5, 0.02, None),
  ("switch:large_128e_geglu", 27_120_887_808, 753_395_712, T5, 0.05, None),
  ("switch:xxl_64e", 201_395_249_152, 11_141_619_712, T5, WRONG, None),
  ("switch:xxl_128e", 394_675_068_928, 11_147_911_168, T5, 0.002, None),
  ("switch:c", 1_571_375_796_640, 1_795_150_240, T5, 0.001, None),
  ("switch:c_30_heads", 1_571_327_873_440, 1_747_227_040, T5, 0.001, None),
  ("glam:0_1b", 137_822_208, 137_822_208, GLAM, 0.07, 0.07),
  ("glam:0_1b_16e", 548_413_440, 152_051_712, GLAM, 0.002, 0.06),
  ("glam:0_1b_32e", 1_001_472_000, 152_125_440, GLAM, 0.01, 0.06),
  ("glam:0_1b_64e", 1_907_589_120, 152_272_896, GLAM, 0.01, 0.06),
  ("glam:0_1b_128e", 3_719_823_360, 152_567_808, GLAM, 0.01, 0.06),
  ("glam:1_7b", 1_676_148_736, 1_676_148_736, GLAM, 0.02, 0.02),
  ("glam:1_7b_32e", 13_957_857_280, 1_878_261_760, GLAM, WRONG, 0.001),
  ("glam:1_7b_64e", 26_843_545_600, 1_879_048_192, GLAM, 0.01, 0.001),
  ("glam:1_7b_128e", 52_614_922_240, 1_880_621_056, GLAM, 0.01, 0.001),
  ("glam:1_7b_256e", 104_157_675_520, 1_883_766_784, GLAM, 0.01, 0.002),
  ("glam:8b", 8_721_006_592, 8_721_006_592, GLAM, 0.005, 0.005),
  ("glam:8b_64e", 142_942_928_896, 9_798_942_720, GLAM, 0.001, 0.001),
  ("glam:137b", 137_701_097_472, 137_701_097_472, GLAM, 0.01, 0.01),
  ("glam:64b_64e", 1_161_755_099_136, 96_603_209_728, GLAM, 0.04, 0.001),
  ("brainformer:100m_32e", 1_001_472_000, 152_125_440, GLAM, 0.01, 0.06),
  ("brainformer:1b_64e", 26_843_545_600, 1_879_048_192, GLAM, 0.01, 0.001),
  ("brainformer:8b_64e", 142_942_928_896, 9_798_942_720, GLAM, 0.001, 0.001),
  ("expert_choice:0_1b_16e", 548_413_440, 152_051_712, GLAM, 0.002, 0.06),
  ("expert_choice:0_1b_32e", 1_001_472_000, 152_125_440, GLAM, 0.01, 0.06),
  ("expert_choice:0_1b_64e", 1_907_589_120, 152_272_896, GLAM, 0.01, 0.06),
  ("expert_choice:0_1b_128e", 3_719_823_360, 152_567_808, GLAM, 0.01, 0.06),
  ("expert_choice:8b_64e", 142_942_928_896, 9_798_942_720, GLAM, 0.001, 0.001),
  ("lifelong_moe:0_1b_16e", 548_413_440, 152_051_712, GLAM, 0.002, 0.06),
  ("lifelong_moe:0_1b_32e", 1_001_472_000, 152_125_440, GLAM, 0.01, 0.06),
  ("lifelong_moe:0_1b_64e", 1_907_589_120, 152_272_896, GLAM, 0.01, 0.06),
  ("lifelong_moe:0_1b_128e", 3_719_823_360, 152_567_808, GLAM, 0.01, 0.06),
  ("st_moe:dense_l", 872_817_664, 872_817_664, T5, 0.1, None),
  ("st_moe:l", 4_105_431_040, 991_160_320, (BIAS, EXTRA), 0.01, None),
  ("st_moe:l_27", 4_091_290_624, 977_019_904, T5, 0.01, None),
  ("st_moe:32b", 269_104_547_840, 35_062_384_640, (BIAS, EXTRA), 0.001, 0.1),
  ("st_moe:32b_27", 268_727_137_280, 34_684_974_080, T5, 0.002, 0.09),
  ("llama_moe:3_0b_2_16", 6_742_618_112, 2_955_161_600, (), 0.01, 0.02),
  ("llama_moe:3_5b_4_16", 6_742_618_112, 3_496_226_816, (), 0.01, 0.002),
  ("llama_moe:3_5b_2_8", 6_740_514_816, 3_494_123_520, (), 0.01, 0.002),
  # The counter gives 1,968,140,800 and 316,633,600 for experts of width 853 1/3. Here they are 853
  # wide, so that each of 64 (activated: 8) experts in 9 layers has 3 * 1280 / 3 parameters less.
  ("deepseek_moe:2b", 1_967_403_520, 316_541_440, (), 0.02, 0.06),
  ("deepseek_moe:16b", 16_375_728_128, 2_828_650_496, (), 0.002, 0.011),
  ("deepseek_moe:145b", 144_478_294_016, 22_052_851_712, (), 0.001, 0.007),
  ("deepseek_moe:142b_half", 142_367_510_528, 13_609_717_760, (), 0.001, WRONG),
  ("deepseek_moe:gshard_137b", 136_138_842_112, 21_513_404_416, (), 0.003, 0.005),
  ("dbrx:132b", 131_596_523_520, 36_469_708_800, (), 0.004, 0.014),
  ("qwen1_5_moe:a2_7b", 14_315_784_192, 2_689_173_504, (), 0.002, 0.005),
  ("mixtral:8x7b", 46_702_792_704, 12_879_925_248, (), 0.001, 0.002),
  ("mixtral:8x22b", 140_630_071_296, 39_161_468_928, (), 0.003, 0.005),
  ("mixtral:8x22b_hf", 140_620_634_112, 39_152_031_744, (), 0.003, 0.004),
  ("llama:2_7b", 6_738_415_616, 6_738_415_616, (), 0.006, None),
  ("llama:3_8b", 8_030_261_248, 8_030_261_248, (), 0.004, None),
  ("qwen2:7b", 7_615_616_512, 7_615_616_512, (), 0.003, None),
  ("qwen2:1_5b", 1_543_714_304, 1_543_714_304, (), 0.03, None),
  ("qwen2:0_5b", 494_032_768, 494_032_768, (), 0.009, None),
  ("olmoe:1b_7b", 6_919_161_856, 1_282_017_280, (), 0.003, 0.015),
  ("deepseek_v2:236b", 235_741_434_880, 21_375_800_320, (), 0.002, 0.02),
  ("deepseek_v2:lite", 15_706_484_224, 2_661_150_208, (), 0.001, 0.11),
  # The next rows come from models that transformers 5.23 builds from the released configurations.
  # It stores matrices for LongCat-Flash's 256 identity experts, too, which are left out here, and
  # its experts share the norm of a dense FFN.
  ("gpt_oss:20b", 20_914_757_184, 4_187_440_704, (), 0.001, 0.17),
  ("gpt_oss:120b", 116_829_156_672, 5_711_982_912, (), 0.001, 0.13),
  ("qwen3_moe:30b_a3b", 30_532_122_624, 3_353_032_704, (), 0.002, 0.017),
  ("qwen3_moe:235b_a22b", 235_093_634_560, 22_190_763_520, (), 0.001, 0.009),
  ("llama4:scout", 107_769_861_120, 17_172_894_720, (), 0.012, 0.011),
  ("llama4:maverick", 400_711_848_960, 17_184_691_200, (), 0.002, 0.011),
  ("kimi_k2:1t", 1_026_408_209_408, 32_861_477_888, (), 0.014, 0.009),
  ("glm_4_5:355b", 352_797_814_784, 33_632_251_904, (), 0.007, 0.052),
  ("glm_4_5:air", 106_852_245_504, 13_424_123_904, (), 0.009, 0.12),
  ("longcat_flash:560b", 560_664_958_976, 32_182_654_976, (EXTRA,), 0.002, 0.03),
  ("deepseek_v3:671b", 671_026_419_200, 37_552_297_472, (BALANCE,), 0.001, 0.016),
]


# The configs that `make test` counts, which are those of each family whose layers differ in kind.
# `make test-all` counts the others, too.
OFTEN = {
  "gshard:12_5b",
  "t5:base",
  "t5:large_geglu",
  "switch:base_16e",
  "switch:c",
  "glam:0_1b",
  "glam:64b_64e",
  "brainformer:100m_32e",
  "expert_choice:0_1b_16e",
  "lifelong_moe:0_1b_32e",
  "st_moe:dense_l",
  "st_moe:l",
  "st_moe:l_27",
  "llama_moe:3_0b_2_16",
  "deepseek_moe:2b",
  "deepseek_moe:16b",
  "deepseek_moe:gshard_137b",
  "dbrx:132b",
  "gpt_oss:20b",
  "llama4:maverick",
  "glm_4_5:355b",
  "longcat_flash:560b",
  "qwen1_5_moe:a2_7b",
  "mixtral:8x7b",
  "mixtral:8x22b_hf",
  "olmoe:1b_7b",
  "deepseek_v2:236b",
  "deepseek_v2:lite",
  "deepseek_v3:671b",
}


def load(name):
  """Returns the config with a name such as "switch:c"."""
  # Imported here because jaxtyping's import hook must come first.
  from moe_jax.commands import load_config

  return load_config(f"configs/{name.replace(':', '.py:')}")


@functools.cache
def counts(name):
  """Returns (config, all parameters, activated parameters, parameters by kind)."""
  c = load(name)
  # All these configs set the size of the vocabulary, so that the one given here is not used.
  return c, *accounts.parameter_counts(c, 0), accounts.parameters_by_kind(c, 0)


def left_out(m, names):
  """Returns the numbers of parameters that the counter leaves out, by name.

  A number is negative if only the counter counts these parameters.

  Args:
    m: `config.model`.
    names: The names of what the counter leaves out.
  """
  stacks = 2 if m.family == "encoder_decoder" else 1
  # Two sublayers of a block correspond to one layer.
  layers = m.num_layers * (len(m.block) // 2 or 1)
  sparse = (
    sum(i >= m.moe.first and (i - m.moe.first) % m.moe.every == 0 for i in range(m.num_layers))
    * stacks
  )
  numbers = {
    # T5 and its descendants have a table per stack, and the others one per layer.
    BIAS: 32 * m.num_heads * stacks * (1 if m.relative_shared else layers),
    NORMS: m.d_model * (5 * layers + 2 if stacks == 2 else 2 * layers + 1),
    EXTRA: m.d_model * sparse,
    # The counter counts this bias, which is state of the router here and no parameter.
    BALANCE: -m.moe.num_experts * sparse,
  }
  return {name: numbers[name] for name in names}


@pytest.mark.parametrize(
  "name, total, activated, absent, tolerance, activated_tolerance",
  [
    pytest.param(*row, id=row[0], marks=() if row[0] in OFTEN else pytest.mark.every_variant)
    for row in TABLE
  ],
)
def test_parameters(name, total, activated, absent, tolerance, activated_tolerance):
  # Catches a matrix too many or too few, a norm or bias that the model of the paper does not have,
  # experts in the wrong layers, and a tied head where that of the paper is not tied.
  c, ours, ours_activated, kinds = counts(name)
  absent = left_out(c.model, absent)
  assert (ours - sum(absent.values()), ours_activated - sum(absent.values())) == (total, activated)
  for kind in {BIAS, NORMS} & set(absent):
    assert kinds[kind] == absent[kind]
  assert sum(kinds.values()) == ours
  for claim, count, within in (
    (c.paper.parameters, ours, tolerance),
    (c.paper.activated, ours_activated, activated_tolerance),
  ):
    assert bool(claim) == (within is not None)
    if within == WRONG:
      assert abs(count / claim - 1) > 0.1 and c.paper.note
    elif claim:
      assert abs(count / claim - 1) <= within


def test_every_variant_is_in_the_table():
  # Catches a new variant that is not counted.
  import importlib

  families = {name.partition(":")[0] for name, *_ in TABLE}
  variants = {
    f"{family}:{variant}"
    for family in families
    for variant in importlib.import_module(f"configs.{family}").VARIANTS
  }
  assert variants == {name for name, *_ in TABLE} >= OFTEN


def test_the_32_billion_of_st_moe():
  # With a capacity factor of 1.25 a token takes 1.25 slots on average.
  # Catches experts that are counted among other kinds.
  c, total, _, kinds = counts("st_moe:32b")
  activated = (
    total - kinds["experts"] * (1 - 1.25 / 64) - sum(left_out(c.model, (BIAS, EXTRA)).values())
  )
  assert activated == 32_231_229_440


@pytest.mark.parametrize(
  "name, total",
  [
    ("t5:base", 222_903_552),  # Hugging Face's t5-base
    ("t5:large", 737_668_096),  # Hugging Face's t5-large
    ("t5:xxl", 11_135_332_352),  # Hugging Face's t5-v1_1-xxl
    ("glam:137b", 137_702_416_384),  # Lingvo's DenseLm128B8x8
  ],
)
def test_totals_of_released_code(name, total):
  # Catches a table of relative biases per layer where T5 has one per stack, a single table where
  # GLaM has one per layer, and a norm too many or too few.
  assert counts(name)[1] == total


@pytest.mark.parametrize(
  "variant, grown, claims",
  [("100m_32e", 1, (3.19e9, 3.33e9)), ("1b_64e", 2, (30e9, 52e9)), ("8b_64e", 4, (158e9, None))],
)
def test_totals_of_the_blocks_that_were_found(variant, grown, claims):
  # The totals in Table 3 fit three MoE sublayers with three matrices and hidden width 2048 in
  # Brainformer-1, except at 100M/32E, where these have 61 % of the claimed parameters. Its rows are
  # therefore not one block at three sizes. Four MoE sublayers with two matrices and hidden width
  # 4096 fit the rows of Brainformer-2. The other sublayers have few parameters; the attention and
  # dense FFNs used for them here are not those of the paper.
  # Catches a stack with another number of blocks, and experts whose width does not grow.
  first = (
    "attention",
    f"moe:hidden={2048 * grown},activation=geglu",
    f"ffn:hidden={2048 * grown}",
  ) * 3
  second = ("attention", f"moe:hidden={4096 * grown},activation=gelu") * 4
  for block, claim, fits in ((first, claims[0], grown > 1), (second, claims[1], True)):
    c = load(f"brainformer:{variant}")
    c.model.block, c.model.d_model = block, 1024 * grown
    if claim:
      assert (abs(accounts.parameter_counts(c, 0)[0] / claim - 1) < 0.05) == fits


def test_activated_without_the_input_embedding():
  # The numbers are claims of DeepSeek, and of gpt-oss's model card.
  # Catches one embedding where there are two.
  for name, billions in (
    ("deepseek_v2:236b", 20.85),
    ("deepseek_v2:lite", 2.45),
    ("deepseek_v3:671b", 36.63),
    ("gpt_oss:20b", 3.61),
    ("gpt_oss:120b", 5.13),
  ):
    _, _, activated, kinds = counts(name)
    assert round((activated - kinds["embedding"] / 2) / 1e9, 2) == billions


@pytest.mark.parametrize(
  "name, claim, within",
  [
    ("deepseek_moe:2b", 4.3e12, 0.01),
    ("deepseek_moe:16b", 74.4e12, 0.021),
    ("deepseek_moe:145b", 585.6e12, 0.01),
    ("deepseek_moe:142b_half", 374.6e12, 0.01),
    ("deepseek_moe:gshard_137b", 572.7e12, 0.01),
  ],
)
def test_training_flops_of_a_sequence(name, claim, within):
  # DeepSeekMoE's Tables 1, 3 and 6 give the FLOPs of training on one sequence.
  # Catches FLOPs of experts that a token is not routed to, an embedding that is counted as a
  # matmul, and attention that is left out (5% at 16B).
  c = load(name)
  assert abs(3 * accounts.flops_per_token(c, 0) * c.data.seq_len / claim - 1) < within


# Shazeer et al. 2017, Tables 7 and 8, without embedding and softmax. Each row has the variant, the
# parameters by a separate counter whose LSTMs have no biases, the parameters of the biases, of
# which each gate has one vector, and the multiply-adds per time step by the same counter.
LSTM_TABLE = [
  ("moe_4", 8_392_704, 4096, 8_392_704),
  ("moe_32", 37_781_504, 4096, 8_421_376),
  ("moe_256", 272_891_904, 4096, 8_650_752),
  ("moe_256_h", 272_908_288, 4096, 8_437_760),
  ("moe_1024_h", 1_079_001_088, 4096, 8_536_064),
  ("moe_4096_h", 4_303_372_288, 4096, 8_929_280),
  ("moe_34m", 4_313_874_432, 8192, 33_849_344),
  ("moe_143m", 4_371_021_824, 32_768, 142_704_640),
  ("moe_1_wide", 8_389_120, 4096, 8_389_120),
  ("4xlstm_512", 8_388_608, 8192, 8_388_608),
  ("lstm_2048_512", 9_437_184, 8192, 9_437_184),
  ("news_32", 37_781_504, 4096, 8_421_376),
  ("news_256_h", 272_924_672, 4096, 8_437_760),
  ("news_1024_h", 1_079_017_472, 4096, 8_486_912),
  ("news_4096_h", 4_303_421_440, 4096, 8_585_216),
  ("news_16384_h", 17_200_971_776, 4096, 8_781_824),
  ("news_65536_h", 68_791_042_048, 4096, 9_175_040),
  ("news_131072_h", 137_577_627_648, 4096, 9_699_328),
  ("news_4xlstm_512", 8_388_608, 8192, 8_388_608),
]


@pytest.mark.parametrize(
  "variant, matrices, biases, operations", LSTM_TABLE, ids=[row[0] for row in LSTM_TABLE]
)
def test_lstm_parameters_and_operations(variant, matrices, biases, operations):
  # The numbers agree with all printed ones to the last digit, except for the total of MoE-34M
  # (5.94B, printed as 6.0) and the operations of MoE-256 (8.65M, printed as 8.6). Those of MoE-143M
  # agree only if the biases are counted.
  # Catches a matrix too many or too few, a gate without noise, tied embeddings, and operations of
  # gates of all groups, or of experts that a token does not visit.
  c, total, _, kinds = counts(f"lstm_moe:{variant}")
  ours, done, paper = total - kinds["embedding"], accounts.operations_per_step(c, 0), c.paper
  assert (ours, done) == (matrices + biases, operations)

  def printed(value, unit):
    return round(value / unit, 1)

  assert printed(ours, 1e6) == printed(paper.without_embedding, 1e6)
  assert (printed(matrices, 1e6) == printed(paper.without_embedding, 1e6)) == (
    variant != "moe_143m"
  )
  assert (
    (printed(total, 1e9) == printed(paper.parameters, 1e9))
    == (variant != "moe_34m")
    == (not paper.note)
  )
  assert (printed(done, 1e6) == printed(paper.operations, 1e6)) == (variant != "moe_256")
  assert abs(done - paper.operations) < 0.051e6


def test_every_lstm_variant_is_in_the_table():
  # Catches a new variant that is not counted.
  from configs import lstm_moe

  assert set(lstm_moe.VARIANTS) == {row[0] for row in LSTM_TABLE}
