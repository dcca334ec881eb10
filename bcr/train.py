"""`python -m bcr.train [key=value ...]`: Batched Contextual Reinforcement, the whole loop on one screen.

bundles -> rollouts -> verdicts -> advantages -> shares of equal cost -> packs -> one optimizer step -> the sampler has the new weights.
`torchrun --nproc_per_node=K -m bcr.train ...` is the same run on K ranks; with `parallel.samplers=S` the last S of them sample for the
next step while the others learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from bcr.analysis.measures import summarise
from bcr.analysis.transcripts import telling_rollouts
from bcr.assemble import Task, assemble, build_bundles, build_grader, build_sampler, check_context, sampling_params
from bcr.dynamic_sampling import Replaced, replace_silent
from bcr.learner.credit import differs_in_accuracy, make_examples
from bcr.learner.learner import Learned, Learner
from bcr.learner.packs import Example, by_prompt
from bcr.learner.targets import MovingTargets
from bcr.model.ops import implementations
from bcr.parallel.exchange import learning_cost, on_every_rank, own_shares
from bcr.parallel.handover import Handover
from bcr.parallel.ranks import Ranks
from bcr.rollouts import Batch, RolloutStream
from bcr.runtime.checkpoints import Checkpoints
from bcr.runtime.clock import Clock
from bcr.runtime.config import as_plain, command_line, launch
from bcr.runtime.console import Silence, StepConsole, TrainingConsole
from bcr.runtime.guards import Guards
from bcr.runtime.host import settle_in
from bcr.runtime.model_card import model_card
from bcr.runtime.outputs import RunFiles, check_trackers, make_room, write_lines
from bcr.runtime.resume import Resumption, find_resumption
from bcr.runtime.schema import TrainConfig
from bcr.runtime.stop import RunStopped, StopRequest
from bcr.runtime.training_state import Stateful, take_snapshot, write_checkpoint
from bcr.sampler import Sampler
from bcr.tasks.bundles import Budget, mixture
from bcr.tasks.grader_pool import GraderPool
from bcr.tasks.judging import Judged, judge


@dataclass
class Run:
    """A config that has passed every check, and what it was turned into."""

    config: TrainConfig
    task: Task
    rollouts: RolloutStream
    grader: GraderPool
    ranks: Ranks
    handover: Handover
    mesh: DeviceMesh | None
    longest: int  # tokens of a rollout with its prompt
    resumption: Resumption | None

    @property
    def sampler(self) -> Sampler:
        return self.rollouts.sampler

    def sample(self, count: int) -> list[list[Judged]]:
        """`count` more groups, sampled and judged now, by all ranks."""
        batch = self.rollouts.sample(count)
        return on_every_rank(batch.places, self.judge(batch), self.ranks)

    def judge(self, batch: Batch) -> list[list[Judged]]:
        """This rank's part of a batch, judged now or ahead."""
        if batch.judged is None:
            batch.judged = judge(batch.bundles, batch.groups, self.task.dialect, self.grader)
        return batch.judged

    def sample_ahead(self, clock: Clock) -> None:
        """Where the last ranks only sample: they sample and judge the next step's batch, with the weights as they are."""
        if self.handover.samplers:
            with clock("sampling"):
                ahead = self.rollouts.ahead()
            with clock("grading"):
                for batch in ahead:
                    self.judge(batch)


def prepare(config: TrainConfig) -> Run:
    """Check everything and load the model. Raises ValueError, with one sentence, before anything expensive starts."""
    for section in (config.reward, config.advantage, config.loss, config.optimizer, config.guards):
        section.check()
    config.off_policy.check(config.bundles.per_step)
    if config.parallel.samplers and config.off_policy.staleness > 1:
        raise ValueError(f"off_policy.staleness is {config.off_policy.staleness}; with parallel.samplers it is 1, so leave it out.")
    if config.parallel.samplers:
        config = replace(config, off_policy=replace(config.off_policy, staleness=1))
    counts = ("steps", "checkpoint_every", "keep_checkpoints")
    positive = {**{name: getattr(config, name) for name in counts}, "bundles.per_step": config.bundles.per_step}
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if config.bundles.resample_rounds < 0:
        raise ValueError(f"bundles.resample_rounds is {config.bundles.resample_rounds}; it must not be negative.")
    if config.bundles.resample_rounds and config.off_policy.staleness:
        cause = "parallel.samplers" if config.parallel.samplers else "off_policy.staleness"
        raise ValueError(f"bundles.resample_rounds replaces groups by fresh ones, which {cause} forbids; set one of them to 0.")
    if config.bundles.contexts == "separate" and config.loss.kind == "gspo":
        raise ValueError("loss.kind is 'gspo', whose ratio is that of one context; with bundles.contexts=separate choose clip or cispo.")
    if config.bundles.group < 2:
        raise ValueError(f"bundles.group is {config.bundles.group}; a group needs 2 rollouts or more to be compared.")
    if not config.sampling.temperature > 0:
        raise ValueError(f"sampling.temperature is {config.sampling.temperature}; training samples need a positive one.")
    for name, off in {"top_k": 0, "top_p": 1.0, "min_p": 0.0}.items():
        if getattr(config.sampling, name) != off:
            raise ValueError(
                f"sampling.{name} is {getattr(config.sampling, name)}; training needs it off ({off}): tokens drawn from a cut distribution "
                "do not have the log-probs that the loss compares with."
            )
    if not config.parallel.timeout_s > 0:
        raise ValueError(f"parallel.timeout_s is {config.parallel.timeout_s}; it must be positive.")
    ranks = Ranks.start(config.device, config.parallel.timeout_s)
    handover = Handover(ranks, config.parallel.samplers)
    mesh = handover.learners.mesh(config.parallel.shard_size) if handover.learners.size > 1 else None
    with ranks.agreeing():
        check_trackers(config)
        resumption = find_resumption(config, ranks.size) if ranks.first else None
    resumption = ranks.broadcast(resumption)
    with ranks.agreeing():
        settle_in(config.threads or (resumption.threads(ranks) if resumption else None), ranks.local_size)
        budget = Budget(config.bundles.budget, config.bundles.budget_per_problem)
        task = assemble(config.model, config.data, config.dialect, config.seed, ranks.device)
        if resumption:
            resumption.check(task.model)
        sizes = mixture(config.bundles.sizes, config.bundles.shares)
        bundles = build_bundles(task, config.bundles, sizes, budget, config.seed)
        longest = check_context(task, sizes, budget)
        task.model.invariant = config.sampling.invariant is True
        params = sampling_params(config.sampling, config.bundles.group, task.dialect, config.seed)
        sampler, grader = build_sampler(task.model, config.sampling, learner=handover.learns), build_grader(config.grading)
        options = (config.bundles.per_step, config.off_policy.staleness, ranks, handover.samplers)
        rollouts = RolloutStream(bundles, sampler, params, *options)
        if ranks.first and resumption is None:
            make_room(Path(config.output), config.overwrite)
        if ranks.first and task.excluded:
            write_lines(Path(config.output) / "excluded.jsonl", map(vars, task.excluded))
    return Run(config, task, rollouts, grader, ranks, handover, mesh, longest, resumption)


def train(run: Run, console: StepConsole | None = None, stop: Callable[[], bool] = lambda: False) -> None:
    """The loop. Everything it learns from is sampled in the same step (on-policy), unless `off_policy` says otherwise.

    `console` is told of every step and warning. Once `stop()` is true, on any rank, it ends early, with a checkpoint. Every rank runs these
    lines; what they sample and learn is shared among them, and the first one speaks and writes. Where the last ones only sample, they have
    no learner, and do their part of the next step while the others learn.
    """
    config, task, ranks, handover, learners = run.config, run.task, run.ranks, run.handover, run.handover.learners
    options = (config.optimizer, config.loss, config.off_policy, config.sampling.temperature, ranks.device)
    learner = Learner(task.model, *options, learners, run.mesh) if handover.learns else None
    guards, clock = Guards(config.guards), Clock(ranks.device)
    has_signal = partial(differs_in_accuracy, advantage=config.advantage)
    parts: dict[str, Stateful] = {"rollouts": run.rollouts, "guards": guards}
    if learner:
        parts["learner"] = learner
    targets = MovingTargets(config.reward) if config.reward.moving else None
    if targets:
        parts["targets"] = targets
    done, offsets = run.resumption.restore(learner, parts, ranks, learners) if run.resumption else (0, {})
    handover.publish(learner, task.model)
    if learner and learners.size > 1 and ranks.device.type == "cuda":
        learner.probe(run.longest, config.bundles.group)
    if learner and handover.samplers:
        learner.drop_copy()
    with (
        run.grader,
        RunFiles(config, offsets, done, ranks.first) as files,
        Checkpoints(Path(config.output) / "checkpoints", config.keep_checkpoints, ranks.first) as checkpoints,
        console or (TrainingConsole(config.steps, title(config), machinery(run), done) if ranks.first else Silence()) as told,
        ranks.failing_as_one(),
    ):
        for step in range(done + 1, config.steps + 1):
            with clock("sampling"):
                batch = run.rollouts.next()
            with clock("grading"):
                groups = run.judge(batch)
            with clock("exchanging"):  # from here on every rank has the whole step
                judged = on_every_rank(batch.places, groups, ranks)
            with clock("resampling"):  # nothing, unless bundles.resample_rounds asks for it
                replaced = replace_silent(judged, has_signal, run.sample, config.bundles.resample_rounds)
                judged, bundles = replaced.groups, [group[0].bundle for group in replaced.groups]
            examples = make_examples(judged, config.advantage, config.reward, targets)
            learned: Learned | None = None
            if learner:
                with clock("learning"):
                    share_prompts = config.optimizer.share_prompts
                    shares = own_shares(examples, config.off_policy.updates, partial(cost, learner), learners, share_prompts)
                    learned = learner.learn_shares(shares, step - 1)
            run.sample_ahead(clock)  # nothing, unless parallel.samplers has ranks that sample while the others learn
            learned = handover.meet(learned, clock)
            with clock("publishing"):
                handover.publish(learner, task.model)
                run.sampler.on_weights_changed()
            metrics = step_metrics(replaced, learned)
            if targets:
                metrics |= targets.metrics
                targets.update(judged)
            seconds = {**ranks.max({**clock.seconds, **clock.peaks}), **ranks.sum({"graders_replaced": run.grader.replaced})}
            files.write("metrics", {"step": step, **metrics})
            files.write("timings", {"step": step, **seconds})
            for record in telling_rollouts(judged, examples, task.dialect, config.logging.rollouts):
                files.write("rollouts", {"step": step, **record})
            told.step(step, {**metrics, **seconds})
            if learned.skipped:
                files.write("events", {"step": step, "kind": "culprits", "rollouts": run.rollouts.names(bundles, learned.culprits)})
            for warning in guards.look({**metrics, "skipped": learned.skipped}):
                files.write("events", {"step": step, **asdict(warning)})
                told.warn(warning.message)
            checkpoints.check()
            ending = ranks.any(stop()) or guards.verdict or step == config.steps
            if ending or (config.checkpoint_every and step % config.checkpoint_every == 0):
                card = model_card(f"{title(config)}, step {step}", command_line("train"), metrics, as_plain(config))
                state = take_snapshot(step, learner, task.model, parts, files.offsets(), ranks, learners)
                if state:
                    checkpoints.save(step, partial(write_checkpoint, state, task.dialect, card))
            if ending:
                break
    if guards.verdict:
        raise RunStopped(guards.verdict)
    if ranks.first and done < config.steps and step < config.steps:
        print(f"stopped after step {step} of {config.steps}; resume=auto goes on from there.")
    if ranks.first:
        print(f"checkpoint: {checkpoints.newest}")


def main(run: Run) -> None:
    with run.ranks, StopRequest() as stop:
        train(run, stop=stop)


def cost(learner: Learner, examples: Sequence[Example]) -> float:
    """What it takes to learn from examples that stand in one pack; nothing for those that are dropped for want of signal."""
    prompts = by_prompt(filter(learner.is_live, examples), learner.config.share_prompts)
    return sum(learning_cost(learner.whole.config, prompt, completions) for prompt, completions in prompts)


def step_metrics(sampled: Replaced, learned: Learned) -> dict[str, Any]:
    """What a step's line in metrics.jsonl says: the measures of its rollouts and of its update. A pure function of the run's seed.

    `tokens_sampled` are all of them, those of groups that were replaced too; everything else is of what was learnt from.
    """
    sums = learned.sums
    judged = [rollout for group in sampled.groups for rollout in group]
    tokens, compared = (max(1.0, sums.get(name, 0.0)) for name in ("tokens", "mismatch_tokens"))
    return {
        **summarise(judged),
        "tokens_sampled": sum(len(rollout.rollout.token_ids) for rollout in judged) + sampled.dropped_tokens,
        "dropped_groups": sampled.dropped_groups,
        "without_signal": 1 - learned.num_live / len(judged),
        "loss": sums.get("loss_sum", 0.0),
        "grad_norm": sums["grad_norm"],
        "updated": sums["updated"],
        "clipped": (sums.get("clipped_low", 0.0) + sums.get("clipped_high", 0.0)) / tokens,
        "dlogprob_mean": sums.get("mismatch_abs_sum", 0.0) / compared,
        "dlogprob_max": sums.get("max_mismatch_abs", 0.0),
        "dlogprob_tokens": sums["mismatch_tokens"],
        "mismatch_kl": sums.get("mismatch_kl_sum", 0.0) / compared,
        **learned.extras,
    }


def machinery(run: Run) -> str:
    """One line that says on what the run computes, and by which implementation of each operation."""
    model, ranks = run.task.model, run.ranks
    weight = model.embed_tokens.weight
    chosen = implementations(ranks.device.type, weight.dtype, model.config.head_dim)
    place = f"{ranks.size} ranks, each {ranks.device.type}" if ranks.size > 1 else ranks.device.type
    place += f", {run.handover.samplers} of them only sampling" if run.handover.samplers else ""
    return f"{place}, {str(weight.dtype).removeprefix('torch.')}; {chosen}"


def title(config: TrainConfig) -> str:
    """One line that says what is trained how."""
    what = "BCR" if max(config.bundles.sizes) > 1 else "GRPO"
    sizes = ", ".join(map(str, config.bundles.sizes))
    batch = f"{config.bundles.per_step} bundles x {config.bundles.group} rollouts"
    budget = f"{config.bundles.budget} shared" if config.bundles.budget else f"{config.bundles.budget_per_problem} a problem"
    budget += " by separate contexts" if config.bundles.contexts == "separate" else ""
    reward = "" if config.reward.kind == "accuracy" else f", {config.reward.kind} reward"
    return f"{what}: N = {sizes}, budget {budget}, {batch}, {config.advantage.scope} credit{reward}"


if __name__ == "__main__":
    launch("train", TrainConfig, prepare, main, ranks=True)
