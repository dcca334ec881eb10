"""One RL step on fixed work, by one library in a process of its own: `python -m bench._rl_step ours|trl [steps=2]`. See `bench.train_step`.

The work: a Qwen3 of 4 layers, 256 wide, vocabulary 4,003, random weights, float32; 8 prompts of 96 tokens, 8 rollouts each, 192 new tokens
each (nothing ever stops), the mean token id as the reward, which leaves no rollout without a signal, one update by GRPO's clipped loss.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bcr.learner.advantages import AdvantageConfig, group_advantages
from bcr.learner.learner import Learner
from bcr.learner.losses import LossConfig
from bcr.learner.off_policy import OffPolicyConfig
from bcr.learner.packs import Example
from bcr.learner.step import OptimizerConfig
from bcr.model import Decoder, DecoderConfig, save_pretrained
from bcr.records import Request, Segment
from bcr.runtime.clock import Clock
from bcr.runtime.host import settle_in
from bcr.sampler import Sampler, SamplingParams
from bench._protocol import _resident_peak, matmul_peak

PROMPTS, PROMPT, GROUP, NEW, VOCABULARY = 8, 96, 8, 192, 4003
NO_STOP = VOCABULARY  # outside the model's vocabulary: a completion ends at its budget


def small_qwen3() -> Decoder:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = DecoderConfig(VOCABULARY, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True, **sizes)
    return Decoder(config).init_weights(0, std=0.1)


def prompts() -> list[list[int]]:
    return torch.randint(0, VOCABULARY, (PROMPTS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def reward_of(token_ids: list[int]) -> float:
    return sum(token_ids) / len(token_ids) / VOCABULARY


def least_flop(config: DecoderConfig) -> dict[str, float]:
    """The multiply-adds, two each, that no way of doing this work avoids, by phase. Each prompt goes through the model once, the head meets
    completions alone, attention what precedes a token: so in sampling. Learning is a forward over the same and a backward of twice that."""
    matrices = sum(p.numel() for p in Decoder(config).parameters() if p.dim() == 2) - config.vocab_size * config.hidden_size
    head, width = config.vocab_size * config.hidden_size, config.num_attention_heads * config.head_dim * config.num_hidden_layers
    rows, length = PROMPTS * GROUP, PROMPT + NEW - 1

    def attention(first: int, last: int) -> float:
        """Of one sequence: scores and values of the places first .. last-1."""
        return sum(4 * width * (place + 1) for place in range(first, last))

    sampling = 2 * matrices * (PROMPTS * PROMPT + rows * (NEW - 1)) + 2 * head * rows * NEW
    sampling += PROMPTS * attention(0, PROMPT) + rows * attention(PROMPT, length)
    return {"sampling": sampling, "learning": 3 * sampling}


def ours(steps: int, share_prompts: int = 1) -> tuple[dict[str, Any], float]:
    """Median seconds by phase, and the peak of the resident set in bytes; the first step warms up. `share_prompts=0`: the learner takes
    each rollout with a prompt of its own."""
    model, cpu = small_qwen3(), torch.device("cpu")
    sampler = Sampler(model)
    optimizer, loss = OptimizerConfig(pack_tokens=4096, share_prompts=bool(share_prompts)), LossConfig(aggregation="token-mean")
    learner = Learner(model, optimizer, loss, OffPolicyConfig(), 1.0, cpu)
    requests = [Request(str(number), prompt, NEW) for number, prompt in enumerate(prompts())]
    clock, phases, peak = Clock(), list[dict[str, float]](), _resident_peak()
    for step in range(steps + 1):
        with clock("sampling"):
            groups = sampler.generate(requests, SamplingParams(1.0, GROUP, (NO_STOP,), seed=step))
        with clock("grading"):
            spans = [Segment(0, 0, NEW)]
            examples = []
            for request, group in zip(requests, groups, strict=True):
                rewards = [[reward_of(rollout.token_ids)] for rollout in group]
                advantages = group_advantages(rewards, [spans] * GROUP, AdvantageConfig())
                examples += [Example(request.prompt_ids, r.token_ids, r.logprobs, spans, a) for r, a in zip(group, advantages, strict=True)]
        with clock("learning"):
            learned = learner.learn(examples, step)
            sampler.on_weights_changed()
        assert learned.num_live == PROMPTS * GROUP
        phases.append({name.removeprefix("seconds_"): value for name, value in clock.seconds.items()})
        peak = max(peak, _resident_peak(), *(int(held * 2**20) for held in clock.peaks.values()))  # the clock sets the mark back
    return {phase: statistics.median(step[phase] for step in phases[1:]) for phase in phases[0]}, peak


def trl(steps: int, micro_batch: int = PROMPTS * GROUP) -> tuple[dict[str, Any], float]:
    """The same by TRL's GRPOTrainer: transformers' generate, learning in passes of `micro_batch` rollouts. The median of whole steps."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({**{f"t{number}": number for number in range(VOCABULARY)}, "<eos>": NO_STOP}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>", padding_side="left")

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert all(len(token_ids) == NEW for token_ids in completion_ids)
        return [reward_of(token_ids) for token_ids in completion_ids]

    class Watch(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(small_qwen3(), Path(folder) / "model")
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=PROMPTS * GROUP // micro_batch,
            num_generations=GROUP,
            max_completion_length=NEW,
            temperature=1.0,
            beta=0.0,
            loss_type="dapo",  # TRL's name for a mean over all tokens
            learning_rate=1e-6,
            max_steps=steps + 1,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        data = Dataset.from_list([{"prompt": " ".join(f"t{token}" for token in prompt)} for prompt in prompts()])
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32),
            reward_funcs=rewards,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.train()
    return {"step": statistics.median(after - before for before, after in zip(Watch.ends, Watch.ends[1:], strict=False))}, _resident_peak()


def compare(repeats: int, micro_batch: int) -> dict[str, Any]:
    """Both libraries, each in a process of its own, one after the other; prints a line for each and returns what was measured."""
    results = {"bcr": in_a_process("ours", f"steps={repeats}")}
    if importlib.util.find_spec("trl") and importlib.util.find_spec("accelerate"):
        results["trl"] = in_a_process("trl", f"steps={repeats}", f"micro_batch={micro_batch}")
    else:
        print("TRL and accelerate cannot be imported here, so there is no peer in this run.")
    flop, rate = least_flop(small_qwen3().config), max(result["matmul_peak"] for result in results.values())
    work = f"{PROMPTS} prompts of {PROMPT} tokens, {GROUP} rollouts each of {NEW}"
    print(f"\n{work}; {torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':6s} {'s/step':>8s} {'limit':>8s} {'share':>6s} {'peak RSS':>9s}   phases")
    for name, result in results.items():
        step, limit = sum(result["seconds"].values()), sum(flop.values()) / rate
        phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in result["seconds"].items())
        result |= {"step": step, "share_of_limit": limit / step}
        print(f"{name:6s} {step:8.2f} {limit:8.2f} {limit / step:6.0%} {result['peak_bytes'] / 1e6:6.0f} MB   {phases}")
    if "trl" in results:
        print(f"steps a second: {results['trl']['step'] / results['bcr']['step']:.2f} times TRL's")
    return {**results, "flop": flop, "matmul_peak": rate, "micro_batch": micro_batch}


def in_a_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench._rl_step", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(library: str, *arguments: str) -> None:
    """The last line: median seconds, the peak of the resident set in bytes, and the matmul rate measured in the same process."""
    options = {name: int(value) for name, value in (argument.split("=") for argument in arguments)}
    settle_in(None)
    seconds, peak_bytes = {"ours": ours, "trl": trl}[library](**{"steps": 2, **options})
    peak = matmul_peak("cpu", torch.float32)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes, "matmul_peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
