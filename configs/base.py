"""Every key there is, with its unit and constraint. An experiment's file is this plus its
differences."""

from ml_collections import config_dict

from moe_jax.assembly.bind import defaults
from moe_jax.dispatch import DISPATCHERS
from moe_jax.routing import ROUTERS
from moe_jax.sharding import CHANGEABLE


def get_config():
  c = config_dict.ConfigDict()
  c.seed = 0  # initialisation, dropout and routing noise; the order of the data has data.seed

  c.model = m = config_dict.ConfigDict()
  # decoder, encoder_decoder, brainformer, lstm (each layer is one, experts may follow it)
  m.family = "decoder"
  m.vocab_size = 0  # entries of the embedding; 0 = the tokenizer's size
  m.target_vocab_size = (
    0  # entries of a second embedding, of encoder_decoder's targets (GShard); 0 = there is none
  )
  m.d_model = 128
  m.num_layers = 4  # of the decoder, where there is an encoder, too
  m.num_encoder_layers = 0  # of encoder_decoder; 0 = num_layers
  m.lstm_units = 0  # of each LSTM of family lstm; 0 = d_model, all else is projected to d_model
  # Sublayers of a block of brainformer, which is stacked num_layers times: attention, ffn or moe,
  # and what differs from the keys below, as in "attention:width=96,heads=3",
  # "ffn:hidden=256,activation=relu", "moe:gate=top_2,capacity=1".
  m.block = ()
  m.num_heads = 4  # query heads
  m.num_kv_heads = 4  # divides num_heads
  m.head_dim = 32  # even with position="rope", which rotates pairs
  # grouped_query, latent (DeepSeek-V2), which reads num_heads, rope_theta and `latent`
  m.attention = "grouped_query"
  m.position = "rope"  # rope, relative (T5's bucketed bias), none
  m.rope_theta = 10_000.0
  m.relative_buckets = 32  # of position="relative"; a multiple of 4
  m.relative_max_distance = 128  # tokens, from which on all distances share the last bucket
  m.relative_shared = (
    False  # one table of biases for all layers of a stack (T5); False = a table a layer (GLaM)
  )
  m.qkv_bias = False  # additive biases on queries, keys and values (Qwen)
  m.qk_norm = (
    False  # RMSNorm over all of a token's query features, and over its key features (OLMoE)
  )
  m.clip_qkv = (
    0.0  # queries, keys and values are cut to [-clip_qkv, clip_qkv] (DBRX), after qk_norm; 0 = not
  )
  m.sliding_window = 0  # tokens that a query sees, itself included (Mixtral); 0 = all earlier ones
  m.query_scale = 0.0  # factor on queries; 0 = head_dim ** -0.5 (T5: 1.0)
  # Widths of latent attention: of the keys' and values' latent, of the queries' (0 = no latent),
  # and of a head.
  m.latent = {
    "kv_rank": 512,
    "query_rank": 0,
    "nope_dim": 128,
    "rope_dim": 64,
    "value_dim": 128,
  }  # rope_dim even
  m.d_ff = 512  # hidden width of the dense FFNs
  m.activation = "swiglu"  # gelu, relu, reglu, geglu, swiglu
  m.ffn_bias = (
    "none"  # none, additive, multiplicative (ST-MoE): on hidden units, of dense FFNs and experts
  )
  # rmsnorm, rmsnorm_unscaled (without parameters, ST-MoE's ablation), layernorm (without bias)
  m.norm = "rmsnorm"
  m.norm_eps = (
    1e-6  # added to the mean square or the variance, of all norms but latent attention's; below 0.1
  )
  m.embed_scale = True  # rows of the embedding times sqrt(d_model) on the way in
  m.tied_embeddings = True
  m.dropout = 0.0  # probability, on the output of each sublayer
  m.dtype = (
    "float32"  # of activations: float32, bfloat16; parameters and routers are always float32
  )
  m.scan_layers = True  # one compiled body for all repeats of the layer pattern
  m.remat = "none"  # none, full (save a layer's input only), dots (save matmul outputs too)

  m.moe = e = config_dict.ConfigDict()
  e.num_experts = 8  # 0 = a dense model
  e.first = 1  # layer i has experts if i >= first and (i - first) % every == 0
  e.every = 2
  e.d_ff = 512  # hidden width of one expert
  e.activation = (
    ""  # of the experts, as model.activation; "" = that (GLaM: gated dense FFNs, plain experts)
  )
  e.extra_ffn = (
    False  # a dense FFN with its own norm and residual right before each layer's experts (ST-MoE)
  )
  e.num_shared_experts = 0  # experts of width d_ff that every token visits (DeepSeekMoE)
  e.shared_gate = False  # multiply what they make by sigmoid(w x) (Qwen1.5-MoE)
  # Only the options of the named router are read.
  e.router = {"name": "top_k"} | {name: dict(router.options) for name, router in ROUTERS.items()}
  e.encoder_priority = (
    ""  # the router's `priority` in the encoder of an encoder_decoder; "" = the same
  )
  e.gate_network = "linear"  # linear, tanh (two layers, LLaMA-MoE): what makes the router's logits
  e.router_init_scale = (
    0.1  # standard deviation of the router's first weights, times sqrt(fan_in); 0 = zeros
  )
  e.router_dtype = (
    "float32"  # bfloat16 rounds the logits, their input and weights: for ST-MoE's ablation
  )
  e.routed_scale = 1.0  # factor on all gates (LLaMA-MoE's N/k, DeepSeek-V2's 16, V3's 2.5)
  e.soft_slots = 0  # above 0: Soft MoE with that many slots an expert, in place of any router
  e.replay_gate = "stored"  # of a stored plan: stored, softmax, softmax_kept, sigmoid, sigmoid_kept
  e.dispatcher = {"name": "grouped"} | {
    name: defaults(function) for name, function in DISPATCHERS.items()
  }
  e.group_size = (
    0  # tokens routed together; divides tokens a batch; 0 = those of group_rows sequences
  )
  e.group_rows = 1  # sequences routed together where group_size is 0; divides a microbatch
  e.capacity_factor = config_dict.placeholder(
    float
  )  # slots an expert, as a multiple; None = dropless
  e.eval_capacity_factor = config_dict.placeholder(
    float
  )  # the same at evaluation; None = capacity_factor
  e.capacity_basis = "tokens"  # slots = factor * S / E (tokens) or factor * S * K / E (assignments)
  e.capacity_rounding = "nearest"  # nearest (flaxformer), down (Mesh-TensorFlow), up (V-MoE)
  e.min_capacity = 1  # slots
  e.jitter = 0.0  # the router sees its input times U[1 - jitter, 1 + jitter]; training only
  e.jitter_on = "input"  # input (Switch), logits (the text of ST-MoE)
  e.balance_loss = (
    0.01  # weights of the auxiliary losses, each 1.0 (or 0.0 for CV^2) at perfect balance
  )
  e.balance_counts = (
    "top_1"  # f of the balance loss counts first choices (top_1) or all assignments (all)
  )
  # group, global: over what f and P are averaged before they are multiplied; global is the whole
  # batch of an update, in all its microbatches, and with train.accumulate_steps > 1 costs up to one
  # more forward pass.
  e.balance_over = "group"
  e.balance_scores = "softmax"  # softmax, sigmoid (DeepSeek-V3): what P averages
  e.z_loss = 0.001
  e.importance_loss = 0.0
  e.importance_of = "probs"  # probs (V-MoE), gates (Shazeer 2017)
  e.load_loss = 0.0
  e.device_loss = 0.0  # balance between the groups of experts that `devices` counts (DeepSeekMoE)
  e.communication_loss = 0.0  # balance of what is sent to them (DeepSeek-V2)
  e.devices = 1  # groups of num_experts / devices consecutive experts; divides num_experts
  e.threshold_loss = 0.0  # trains the thresholds of strictly_balanced
  e.layer_reduce = "mean"  # mean, sum: how the layers' auxiliary losses become one
  e.bias_update_rate = 0.0  # step of the loss-free balancing bias (DeepSeek-V3); 0 = no bias
  e.allow_noncausal_routing = False  # routers that see later tokens cheat in a causal model

  c.data = d = config_dict.ConfigDict()
  d.sources = (
    "embedded:prose",
    "embedded:code",
    "embedded:tables",
  )  # or text:GLOB, jsonl:GLOB, tfds:NAME
  # share of each source; () = proportional to its tokens (windows) or documents (stream)
  d.weights = ()
  d.pipeline = (
    "windows"  # windows: tokenised once, shuffled globally; stream: tokenised and packed on the fly
  )
  d.tokenizer = "bytes"  # bytes, sentencepiece:FILE, hf:FILE
  # Names of tokens of that file, such as "<|endoftext|>": the one that starts every document ("" =
  # the one that published models use, where the file declares it special, or else a new id, which
  # is told), and one that ends every document ("" = none: it ends where the next one starts). Text
  # that spells them out is read as text.
  d.bos = ""
  d.eos = ""
  d.objective = "next_token"  # next_token; span_corruption (T5), which an encoder_decoder needs
  d.seq_len = 256  # tokens; of the decoder, where there is an encoder, too
  d.encoder_len = 256  # tokens that an encoder reads (span_corruption)
  d.noise_density = 0.15  # share of the tokens that are masked (span_corruption)
  d.mean_span = 3.0  # tokens, mean length of a masked span (span_corruption)
  d.validation_fraction = 0.05  # of the documents, by a hash of their key; above 0 and below 1
  d.seed = 0
  d.threads = 2  # that read ahead
  d.cache_dir = ""  # of tokenised sources; "" = $XDG_CACHE_HOME/moe_jax or ~/.cache/moe_jax
  d.tfds_dir = ""  # where TFDS datasets were prepared; "" = TFDS's default
  d.text_field = "text"  # of a JSONL line or a TFDS example
  d.validation_split = ""  # of TFDS sources; "" = by the hash, as elsewhere

  c.optimizer = o = config_dict.ConfigDict()
  o.name = "adamw"  # adamw, adafactor
  o.learning_rate = 1e-3  # peak
  # after the warm-up: cosine, rsqrt, wsd, steps, constant; flat_rsqrt holds the peak till then
  o.schedule = "cosine"
  o.warmup_steps = 100
  o.final_fraction = 0.1  # of the peak, at the last step (cosine, wsd)
  o.decay_fraction = 0.2  # of all steps that decay (wsd)
  o.milestones = (
    0.8,
    0.9,
  )  # fractions of all steps, from each of which on the rate is times milestone_factor (steps)
  o.milestone_factor = 0.316
  o.update_clip = 1.0  # RMS that a matrix's update may have before its learning rate (adafactor)
  o.b1 = 0.9
  o.b2 = 0.95
  o.eps = 1e-8
  o.weight_decay = 0.1  # on matrices, not on norm scales
  o.clip_norm = 1.0  # global; 0 = none
  o.freeze = ()  # names of parameters that do not train, such as ("router",)

  c.train = t = config_dict.ConfigDict()
  t.steps = 1000
  t.batch_size = 32  # sequences a step, over all processes
  # Microbatches a step; divides batch_size. They make the update of the whole batch where groups
  # lie within rows.
  t.accumulate_steps = 1
  t.log_every = 10  # steps
  t.eval_every = 200  # steps
  t.eval_batches = 16  # a source; 0 = its whole validation split
  t.checkpoint_every = 200  # steps
  t.output_z_loss = 0.0  # weight of log^2 Z of the output softmax
  t.keep_last = 1  # newest checkpoints that are kept, at least 1
  t.keep_best = 1  # checkpoints of the lowest validation score that are kept besides
  t.max_minutes = (
    0.0  # of wall-clock time, after which this start saves and ends with exit code 0; 0 = no limit
  )
  t.final_eval_batches = 0  # a source, at the end of the run; 0 = its whole validation split
  # What to do about steps that go wrong, see moe_jax/training/guard.py. GLaM names the first and
  # the rollbacks.
  t.guard = g = config_dict.ConfigDict()
  g.skip_nonfinite = False  # skip an update whose gradient is not finite
  g.spike_sigmas = (
    0.0  # a loss that far above the median of the last good ones is a spike; 0 = no loss is
  )
  g.spike_window = 64  # good losses that it is compared with, at least 16
  g.patience = (
    8  # bad steps (not finite, or a spike) in a row, after which the run goes back to a checkpoint
  )
  g.max_rollbacks = (
    0  # how often it goes back and skips the batches since; then it stops as diverged
  )
  g.rollback_margin = (
    0  # steps; it goes back to a checkpoint from at least that long before the first bad step
  )
  g.starved_share = 0.0  # warn of experts that get less than this part of an even share; 0 = never

  c.mesh = {
    "data": -1,
    "fsdp": 1,
    "expert": 1,
    "tensor": 1,
  }  # devices an axis; -1 = all that are left

  # Mesh axes that split each logical axis, from the first on as many as divide it; see
  # moe_jax/sharding/rules.py.
  c.sharding = dict(CHANGEABLE)

  # What the paper claims, in numbers of parameters: all, activated, without embedding and softmax;
  # and in multiply-adds a time step, also without (0.0 = it says nothing). Shown by `python -m
  # moe_jax.describe`.
  c.paper = {
    "name": "",
    "parameters": 0.0,
    "activated": 0.0,
    "without_embedding": 0.0,
    "operations": 0.0,
    "note": "",
  }

  # results.json of another run, shown beside this one's; sources with more training text than so
  # many megabytes get no ladder of n-gram models and LZMA, which would take minutes (0 = none gets
  # one).
  c.report = {"compare": "", "ladder_megabytes": 32.0}

  return c.lock()
