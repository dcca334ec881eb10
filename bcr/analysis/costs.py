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
LOGITS_BYTES = 24  # a place of a row of logits while sampling: float32 logits and log-probs, float64 probabilities and their sums
PADDING = 1.1  # of attention's padded batches


@dataclass
class Device:
    """A GPU by its data sheet: memory [GiB], dense bfloat16 [TFLOP/s], bandwidth [TB/s]. `reserve` GiB go to CUDA and fragmentation."""

    name: str = "H100-80GB"
    memory_gib: float = 79.0
    tflops: float = 989.0
    bandwidth: float = 3.35
    reserve: float = 4.0


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

    @property
    def length(self) -> int:
        return self.prompt + self.budget

    @property
    def places(self) -> int:
        """Tokens of the largest pack: a rollout that is longer than `pack_tokens` makes a pack of its own."""
        return max(self.pack_tokens, self.length)


def parameters(config: DecoderConfig) -> int:
    """Number of weights."""
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return embeddings + config.hidden_size + config.num_hidden_layers * layer_parameters(config)


def layer_parameters(config: DecoderConfig) -> int:
    hidden, head = config.hidden_size, config.head_dim
    query, both = config.num_attention_heads * head, (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    attention = hidden * both + query * hidden + (both if config.qkv_bias else 0) + (2 * head if config.qk_norm else 0)
    return attention + 3 * hidden * config.intermediate_size + 2 * hidden


def layer_activations(config: DecoderConfig, weight_bytes: int, padding: float = 1.0, attention_bytes: int | None = None) -> float:
    """Bytes per token that a layer keeps for its backward. Attention's padded copies take `attention_bytes` a number: 4 on a CPU, where
    they are float32; None is as wide as the weights."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    narrow = weight_bytes < 4
    # A norm keeps its float32 input, what it gives before its weight, and (for the projection after it) what it gives after it.
    norms = 2 * hidden * (4 + 2 * weight_bytes)
    # q/k norm: the same without the last; in float32 its input is the projection's whole output, the values' part included.
    qk_norm = ((query + key) * (4 + weight_bytes) + (0 if narrow else 4 * key)) if config.qk_norm else 0
    # q, k, v and output, padded; the output again, packed.
    attention = (attention_bytes or weight_bytes) * padding * (query + 2 * key + query) + weight_bytes * query
    swiglu = weight_bytes * 4 * inner  # gate, up, silu(gate), and their product
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
    wanted = min(load.in_flight, -(-load.rollouts // load.devices))
    return min(wanted, int(load.cache_bytes // kv_bytes(config, load)) - 1)


def memory(config: DecoderConfig, load: Load) -> dict[str, float]:
    """Bytes by part on one device. With several, masters, moments and gradients are sharded (FSDP) and the sampler has whole weights."""
    count, share = parameters(config), parameters(config) / load.devices
    embedding = config.vocab_size * config.hidden_size
    sharded = load.devices > 1
    narrow = load.weight_bytes < 4
    gathered = embedding + 2 * layer_parameters(config)  # the root module and two layers, whole
    return {
        "weights": load.weight_bytes * (gathered if sharded else count),
        "masters": 4 * share if narrow or sharded else 0,
        "moments": STATE_BYTES * share,
        "gradients": 4 * share + (load.weight_bytes * gathered if sharded else 0),
        "activations": activations(config, load),
        "head": 4 * embedding + 8 * load.places * config.hidden_size,  # float32 gradients of its weight and of hidden
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
    """Seconds of a step by phase, every rollout as long as its budget: arithmetic and memory traffic at the assumed shares of the peak."""
    own = -(-load.rollouts // load.devices)
    rows = slots(config, load)
    waves = -(-own // rows)
    rows = -(-own // waves)
    count = parameters(config) - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)  # rows looked up are free
    half_full = kv_bytes(config, load) * (load.prompt + load.budget / 2) / load.length
    traffic = (load.weight_bytes * count + rows * half_full) / (device.bandwidth * 1e12)
    arithmetic = 2 * count * rows / (device.tflops * 1e12)
    sampling = waves * load.budget * max(traffic, arithmetic) / DECODE_EFFICIENCY
    query = config.num_attention_heads * config.head_dim
    attention = 2 * config.num_hidden_layers * query * load.length  # of one token: scores and values over half the sequence each
    forward = 2 * count + attention
    passes = 4 if load.checkpointing else 3
    learning = own * load.length * passes * forward / (device.tflops * 1e12) / LEARNING_MFU
    return {"sampling": sampling, "learning": learning}
