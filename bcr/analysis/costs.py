"""What a training run needs of a device, from its config alone: bytes by part, seconds by phase. Pure functions; see `bcr.plan`.

P parameters, T tokens of a pack, L layers, H hidden, Q and K query and key/value heads, D head size, I intermediate size, V vocabulary.
The activations are those that this decoder keeps for its backward (`bcr.model.decoder`, counted tensor by tensor), not a rule of thumb;
tests compare them with what autograd really saves and with the peak memory of a process.
"""

from __future__ import annotations

from dataclasses import dataclass

from bcr.model import DecoderConfig

GIB = 2**30
STATE_BYTES = 8  # the two moments of AdamW, float32
LEARNING_MFU, DECODE_EFFICIENCY = 0.4, 0.6  # assumed shares of the device's peak; no GPU figure of this code exists yet
LAUNCH, CAPTURED = 5e-6, 1.5e-6  # assumed seconds from one small kernel to the next, launched one by one and in a captured graph
LAYER_KERNELS = 15  # of one pass through a layer without its mixture, counted in `bcr.model`
SEEKING_KERNELS, EXPERT_KERNELS = 3, 7  # of one expert: to find its tokens, and to work on them where there are any
LOGITS_BYTES = 24  # a place of a row of logits while sampling: float32 logits and log-probs, float64 probabilities and their sums
PADDING = 1.1  # of attention's padded batches


@dataclass
class Device:
    """A GPU by its data sheet: memory [GiB], dense bfloat16 [TFLOP/s], bandwidth [TB/s]. `reserve` GiB go to CUDA and fragmentation.

    `launch`, `captured`: seconds that a kernel takes however small it is, by itself and in a captured graph. `learning` and `decoding`: the
    shares of the peak they are taken to reach.
    """

    name: str = "H100-80GB"
    memory_gib: float = 79.0
    tflops: float = 989.0
    bandwidth: float = 3.35
    reserve: float = 4.0
    launch: float = LAUNCH
    captured: float = CAPTURED
    learning: float = LEARNING_MFU
    decoding: float = DECODE_EFFICIENCY


GPUS = {  # from the vendors' data sheets: GiB, dense bfloat16 TFLOP/s, TB/s
    "h100": Device(),
    "h200": Device("H200-141GB", 140.0, 989.0, 4.8),
    "a100": Device("A100-80GB", 79.0, 312.0, 2.04),
    "a100_40": Device("A100-40GB", 39.5, 312.0, 1.56),
    "rtx_pro_6000": Device("RTX PRO 6000 Blackwell", 95.0, 500.0, 1.79),
    "rtx_4090": Device("RTX 4090", 23.6, 165.0, 1.01),
}


@dataclass(frozen=True)
class Load:
    """What a step does, and on how many devices. Lengths in tokens."""

    weight_bytes: int  # of one working weight: 2 or 4
    checkpointing: bool
    pack_tokens: int
    prompt: int  # a bundle's
    budget: int  # new tokens of a rollout at most
    rollouts: int  # of a step
    in_flight: int  # rollouts decoded at the same time, on one device
    cache_bytes: float  # the most that keys and values may take on one device
    devices: int = 1
    group: int = 1  # rollouts of one bundle, sampled on one device
    trained: float | None = None  # numbers of low-rank adapters, the weights being frozen; None: the weights themselves are trained
    shard: int | None = None  # devices that share one copy of masters, moments and gradients; None: all (HSDP has fewer)

    @property
    def sharded(self) -> int:
        return self.shard or self.devices

    @property
    def bundles(self) -> int:
        """Of the device that samples the most."""
        return -(-self.rollouts // (self.group * self.devices))

    @property
    def length(self) -> int:
        return self.prompt + self.budget

    @property
    def places(self) -> int:
        """Tokens of the largest pack: a rollout that is longer than `pack_tokens` makes a pack of its own."""
        return max(self.pack_tokens, self.length)


def parameters(config: DecoderConfig, experts: float | None = None) -> float:
    """Number of weights; with `experts` only so many of each mixture count: those a token goes through, or those a batch touches."""
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    dense = sum(layer in config.mlp_only_layers for layer in range(config.num_hidden_layers)) if config.num_experts else 0
    mixed = config.num_hidden_layers - dense
    layers = dense * (attention_parameters(config) + mlp_parameters(config)) + mixed * layer_parameters(config, experts)
    return embeddings + config.hidden_size + layers


def body_parameters(config: DecoderConfig, experts: float | None = None) -> float:
    """Without embedding and head."""
    return parameters(config, experts) - (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size


def layer_parameters(config: DecoderConfig, experts: float | None = None) -> float:
    """Of one layer, of a mixture where the model is one."""
    if not config.num_experts:
        return attention_parameters(config) + mlp_parameters(config)
    one, router = 3 * config.hidden_size * config.moe_intermediate_size, config.hidden_size * config.num_experts
    return attention_parameters(config) + router + one * (config.num_experts if experts is None else experts)


def attention_parameters(config: DecoderConfig) -> int:
    """Projections and the layer's norms."""
    hidden, head = config.hidden_size, config.head_dim
    query, both = config.num_attention_heads * head, (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    attention = hidden * both + query * hidden + (both if config.qkv_bias else 0) + (2 * head if config.qk_norm else 0)
    return attention + 2 * hidden


def mlp_parameters(config: DecoderConfig) -> int:
    return 3 * config.hidden_size * config.intermediate_size


def touched_experts(config: DecoderConfig, tokens: float) -> float:
    """Distinct experts of a layer that `tokens` tokens go through, expected, where every expert is as likely as any other."""
    if not config.num_experts:
        return 0.0
    return config.num_experts * (1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens)


def layer_activations(config: DecoderConfig, weight_bytes: int, padding: float = 1.0, attention_bytes: int | None = None) -> float:
    """Bytes per token that a layer keeps for its backward. Attention's padded copies take `attention_bytes` a number: 4 on a CPU, where
    they are float32; None is as wide as the weights."""
    hidden, wide = config.hidden_size, max(weight_bytes, 4)
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    narrow = weight_bytes < 4
    # A norm keeps its float32 input, what it gives before its weight, and (for the projection after it) what it gives after it.
    norms = 2 * hidden * (4 + 2 * weight_bytes)
    # q/k norm: the same without the last; in float32 its input is the projection's whole output, the values' part included.
    qk_norm = ((query + key) * (4 + weight_bytes) + (0 if narrow else 4 * key)) if config.qk_norm else 0
    # q, k, v and output, padded; the output again, packed.
    attention = (attention_bytes or weight_bytes) * padding * (query + 2 * key + query) + weight_bytes * query
    swiglu = weight_bytes * 4 * config.intermediate_size  # gate, up, silu(gate), and their product
    if config.num_experts:  # the same in each chosen expert; its input, output and weighted output, their places; the probabilities
        chosen = config.num_experts_per_tok
        swiglu = chosen * (weight_bytes * (4 * config.moe_intermediate_size + 3 * hidden) + 40) + wide * config.num_experts
    return norms + qk_norm + attention + swiglu


def activations(config: DecoderConfig, load: Load) -> float:
    """Bytes that a forward pass over the largest pack keeps; with checkpointing each layer's input, and one layer's own at a time."""
    per_token = layer_activations(config, load.weight_bytes, PADDING)
    boundary = load.weight_bytes * config.hidden_size
    kept = boundary * config.num_hidden_layers + per_token if load.checkpointing else per_token * config.num_hidden_layers
    last_norm = config.hidden_size * (4 + 2 * load.weight_bytes)
    return load.places * (kept + last_norm + per_token)  # once more a layer's: the gradients on their way back through it


def kv_bytes(config: DecoderConfig, load: Load) -> float:
    """Bytes of keys and values of one rollout of full length."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * load.length * load.weight_bytes


def slots(config: DecoderConfig, load: Load) -> int:
    """Rollouts that decode at the same time on one device: as many as are asked for and fit the cache beside their group's prompt."""
    wanted = min(load.in_flight, load.bundles * load.group)
    return min(wanted, int(load.cache_bytes // kv_bytes(config, load)) - 1)


def learnt(config: DecoderConfig, load: Load) -> float:
    """How many numbers are trained."""
    return parameters(config) if load.trained is None else load.trained


def memory(config: DecoderConfig, load: Load) -> dict[str, float]:
    """Bytes by part on one device. With several, masters, moments and gradients are sharded (FSDP) and the sampler has whole weights."""
    count = parameters(config) + (load.trained or 0)
    share = learnt(config, load) / load.sharded
    embedding = config.vocab_size * config.hidden_size
    sharded = load.devices > 1
    narrow = load.weight_bytes < 4
    gathered = embedding + 2 * layer_parameters(config)  # the root module and two layers, whole
    return {
        "weights": load.weight_bytes * (gathered if sharded else count),
        "frozen shards": load.weight_bytes * (count - load.trained) / load.sharded if sharded and load.trained is not None else 0,
        "masters": 4 * share if narrow or sharded else 0,
        "moments": STATE_BYTES * share,
        "gradients": 4 * share + (load.weight_bytes * gathered if sharded and load.trained is None else 0),
        "activations": activations(config, load),
        # float32 gradients of its weight, where that is trained, and of hidden
        "head": (4 * embedding if load.trained is None else 0) + 8 * load.places * config.hidden_size,
        "KV cache": (slots(config, load) + 1) * kv_bytes(config, load),
        "logits while sampling": LOGITS_BYTES * slots(config, load) * config.vocab_size,
        "sampler copy": load.weight_bytes * count if sharded else 0,
    }


LEARNING_ONLY, SAMPLING_ONLY = ("gradients", "activations", "head"), ("logits while sampling",)


def peak(parts: dict[str, float]) -> float:
    """Bytes at the fuller of the two phases; the cache stays where it is while learning."""
    both = sum(size for part, size in parts.items() if part not in (*LEARNING_ONLY, *SAMPLING_ONLY))
    return both + max(sum(parts[part] for part in LEARNING_ONLY), sum(parts[part] for part in SAMPLING_ONLY))


def seconds(config: DecoderConfig, load: Load, device: Device) -> dict[str, float]:
    """Seconds of a step by phase on the busiest device, every rollout as long as its budget; what devices tell each other is left out."""
    return {"sampling": sampling_seconds(config, load, device), "learning": learning_seconds(config, load, device)}


def sampling_seconds(config: DecoderConfig, load: Load, device: Device) -> float:
    """Prompts prefilled once a bundle, then token after token: weights and half-full caches read, or the arithmetic where that is more,
    at the assumed share of the peak, and on top what a pass through the layers takes however small it is."""
    own = load.bundles * load.group
    waves = -(-own // slots(config, load))
    rows = own / waves  # on average; whole ones would make a number of waves look better than it is
    head = config.vocab_size * config.hidden_size
    half_full = kv_bytes(config, load) * (load.prompt + load.budget / 2) / load.length
    traffic = load.weight_bytes * (body_parameters(config, touched_experts(config, rows)) + head) + rows * half_full
    arithmetic = 2 * (body_parameters(config, config.num_experts_per_tok) + head) * rows
    decoding = max(traffic / (device.bandwidth * 1e12), arithmetic / (device.tflops * 1e12)) / device.decoding
    prefill = load.bundles * load.prompt * forward_flop(config, load.prompt) / (device.tflops * 1e12) / device.learning
    kernel = device.launch if config.num_experts else device.captured  # the choice of experts makes the host wait: no graph
    return prefill + waves * load.budget * (decoding + fixed_seconds(config, rows, kernel))


def learning_seconds(config: DecoderConfig, load: Load, device: Device) -> float:
    """The arithmetic of the device's rollouts at the assumed share of the peak, on top what its passes take however small they are. With
    checkpointing the layers run forward once more; the head meets the completions alone and has no such pass. Frozen weights need no
    gradient, a third of the arithmetic; what adapters of low rank add is left out."""
    own, trains = -(-load.rollouts // load.devices), 3 if load.trained is None else 2
    passes = trains + load.checkpointing
    body = passes * own * load.length * forward_flop(config, load.length)
    head = trains * own * load.budget * 2 * config.vocab_size * config.hidden_size
    fixed = passes * packs(load) * fixed_seconds(config, load.places, device.launch)
    return (body + head) / (device.tflops * 1e12) / device.learning + fixed


def forward_flop(config: DecoderConfig, length: int) -> float:
    """Of one token of a sequence, the head left out: 2 for each weight it meets, and attention's scores and values over half of it."""
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return 2 * body_parameters(config, config.num_experts_per_tok) + attention


def fixed_seconds(config: DecoderConfig, tokens: float, kernel: float) -> float:
    """A forward pass with next to nothing to compute, `kernel` seconds a kernel. A mixture looks at its experts one after the other."""
    mixed = config.num_hidden_layers - len(config.mlp_only_layers) if config.num_experts else 0
    experts = SEEKING_KERNELS * config.num_experts + EXPERT_KERNELS * touched_experts(config, tokens)
    return (config.num_hidden_layers * LAYER_KERNELS + mixed * experts) * kernel


def packs(load: Load) -> int:
    """Of the busiest device; all have as many."""
    rollouts = -(-load.rollouts // load.devices)
    return -(-rollouts // (load.places // load.length))
