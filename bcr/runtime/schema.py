"""The types of `configs/train.yaml` and `configs/evaluate.yaml`; the YAML files hold the defaults' meaning in comments."""

from __future__ import annotations

from dataclasses import dataclass, field

from bcr.learner.advantages import AdvantageConfig
from bcr.learner.losses import LossConfig
from bcr.learner.off_policy import OffPolicyConfig
from bcr.learner.rewards import RewardConfig
from bcr.learner.step import OptimizerConfig
from bcr.model.lora_config import LoraConfig
from bcr.runtime.guards import GuardConfig


@dataclass
class RandomModel:
    """Sizes of a Qwen3-shaped decoder with random weights, and of the tokenizer trained on the data's own text."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 2048


@dataclass
class ModelConfig:
    path: str | None = None
    random: RandomModel | None = None
    dtype: str = "auto"
    activation_checkpointing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class DataConfig:
    kind: str = "arithmetic"
    split: str = "train"
    operations: list[int] = field(default_factory=lambda: [2, 3, 4])
    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    hub_split: str = "train"
    question: str = "problem"
    answer: str = "answer"
    id: str = "id"
    difficulty: str = "difficulty"
    answer_form: str = "plain"
    exclude: list[str] = field(default_factory=list)
    exclude_ngram: int = 8
    exclude_share: float = 0.5


@dataclass
class DialectConfig:
    form: str = "markdown"
    chat: bool = True
    system: str | None = None
    thinking: bool | None = None
    answers_in_thinking: bool = False


@dataclass
class BundleConfig:
    sizes: list[int] = field(default_factory=lambda: [3])
    shares: list[float] | None = None
    budget: int | None = None
    budget_per_problem: int | None = None
    contexts: str = "shared"
    arrangement: str = "mixed"
    count: int | None = None
    per_step: int = 12
    group: int = 8
    resample_rounds: int = 0


@dataclass
class SamplingConfig:
    temperature: float = 1.0
    max_batch: int = 256
    row_block: int = 16
    cache_mb: int | None = None
    invariant: bool | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass
class GradingConfig:
    workers: int = 2
    deadline_s: float = 5.0
    memory_mb: int = 1024


@dataclass
class LoggingConfig:
    rollouts: int = 2
    tensorboard: bool = False
    wandb: str | None = None


@dataclass
class ParallelConfig:
    samplers: int = 0
    shard_size: int | None = None
    timeout_s: float = 1800.0


@dataclass
class TrainConfig:
    output: str = "outputs/train"
    overwrite: bool = False
    resume: str = "never"
    seed: int = 0
    steps: int = 60
    device: str = "auto"
    threads: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dialect: DialectConfig = field(default_factory=DialectConfig)
    bundles: BundleConfig = field(default_factory=BundleConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    off_policy: OffPolicyConfig = field(default_factory=OffPolicyConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint_every: int | None = None
    keep_checkpoints: int | None = None
    guards: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class EvaluateConfig:
    output: str | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dialect: DialectConfig = field(default_factory=DialectConfig)
    benchmarks: list[str] = field(default_factory=list)
    problems: int | None = 600
    sizes: list[int] = field(default_factory=lambda: [1, 2, 3])
    samples: int = 1
    cut_at: list[int] = field(default_factory=list)
    cyclic: bool = False
    budgets: list[int] = field(default_factory=list)
    budgets_per_problem: list[int] = field(default_factory=list)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)


@dataclass
class DifficultyConfig:
    output: str = "outputs/difficulty"
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dialect: DialectConfig = field(default_factory=DialectConfig)
    problems: int | None = None
    samples: int = 8
    budget: int = 4096
    above: float = 0.5
    up_to: float = 1.0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
