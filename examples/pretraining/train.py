"""Pre-train a model of transformers in two stages, on 1 to 8 GPUs or on a CPU.

    python examples/pretraining/train.py examples/pretraining/small.yaml [steps=200 model.hidden_size=256 ...]
    torchrun --standalone --nproc-per-node 8 examples/pretraining/train.py CONFIG.yaml

Documents are packed into rows and attention stays inside each. Parameters are sharded by FSDP2, in bf16 with fp32 masters.
The same command goes on from the last checkpoint, on any number of ranks. README.md tells what the YAML fields mean.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from data import Rows, hold_out, load_tokenizer, open_source, train_tokenizer
from losses import dense_loss, documents_of, loss_of_export, loss_sum, predicted, probe
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from trackers import open_trackers
from transformers import AutoConfig, AutoModelForCausalLM, get_scheduler

import lighthouse_fx
from lighthouse_fx import LighthouseConfig
from lighthouse_fx.frontend.blocks import repeated_blocks

say = logging.getLogger("pretraining")
# What a checkpoint is not resumed under another value of; `steps` and `stages` are checked by TwoStage.
FIXED = (
    "model", "tokenizer", "data", "prefetch", "sequence_length", "global_batch", "dtype", "lighthouse", "optimizer",
    "schedule", "seed",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The YAML file. Sections are passed on as keyword arguments, so a wrong name in one is an error."""

    out: str
    steps: int
    sequence_length: int
    global_batch: int  # rows of an optimizer step, over all ranks
    micro_batch: int = 1  # rows of a forward and backward
    dtype: str = "bfloat16"  # of forward and backward; parameters and optimizer are float32
    activation_checkpointing: bool = False
    max_grad_norm: float = 1.0
    seed: int = 0
    model: dict[str, Any]  # `from` or `type`, and fields of the configuration
    tokenizer: dict[str, Any]  # `from` or `train`
    data: dict[str, Any]
    prefetch: bool = True  # read data in another process, by torchdata
    lighthouse: dict[str, Any] = field(default_factory=dict)  # LighthouseConfig
    stages: dict[str, Any] = field(default_factory=dict)  # TwoStage
    optimizer: dict[str, Any] = field(default_factory=dict)  # AdamW
    schedule: dict[str, Any] = field(default_factory=dict)  # transformers.get_scheduler
    evaluate_every: int = 100
    evaluation_rows: int = 8
    probe_every: int = 0  # leak and passkeys; 0: never
    leak_cuts: int = 96
    passkey: dict[str, Any] = field(default_factory=dict)  # lighthouse_fx.Passkey
    save_every: int = 100
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()  # tensorboard, wandb, trackio


class Yaml(yaml.SafeLoader):
    """PyYAML, which by itself reads 3e-4 as a string."""


Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def read_settings(path: str, *overrides: str) -> Settings:
    """A YAML file, and `name=value` or `section.name=value` laid over it."""
    fields = yaml.load(Path(path).read_text(), Yaml)
    for override in overrides:
        names, found, value = override.partition("=")
        if not found:
            raise ValueError(f"{override!r} is no setting: give name=value, such as steps=200 or model.hidden_size=256")
        *sections, name = names.split(".")
        section = fields
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = yaml.load(value, Yaml)
    return Settings(**fields)


# --- model and processes ----------------------------------------------------------------------------------------------


def start_processes() -> tuple[int, int, torch.device]:
    """This process's rank, how many there are, and its device. Without torchrun there is one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return dist.get_rank(), dist.get_world_size(), device


def build_model(settings: Settings, tokenizer: Any) -> nn.Module:
    """The model with new weights, the same on every rank, in float32."""
    given = {"vocab_size": len(tokenizer), "max_position_embeddings": settings.sequence_length} | settings.model
    given |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    name, kind = given.pop("from", None), given.pop("type", None)
    if (name is None) == (kind is None):
        raise ValueError(f"model={settings.model}: give either `type`, such as llama, or `from`, a name or folder")
    config = AutoConfig.from_pretrained(name, **given) if name else AutoConfig.for_model(kind, **given)
    torch.manual_seed(settings.seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def compile_and_shard(model: nn.Module, settings: Settings, device: torch.device, world: int) -> None:
    """Each block is compiled and sharded by itself."""
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = list(repeated_blocks(model).children())
    lighthouse_fx.compile(model, LighthouseConfig(**settings.lighthouse))
    mesh = init_device_mesh(device.type, (world,))
    precision = MixedPrecisionPolicy(param_dtype=getattr(torch, settings.dtype), reduce_dtype=torch.float32)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=precision)


def gather(model: nn.Module, settings: Settings, device: torch.device) -> nn.Module | None:
    """The whole model on rank 0, an ordinary one of transformers; None elsewhere."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa", dtype=torch.float32)
    plain.load_state_dict(state)
    return plain.to(device, getattr(torch, settings.dtype))


def build_optimizer(model: nn.Module, *, weight_decay: float = 0.1, **arguments: Any) -> torch.optim.Optimizer:
    """AdamW; norms and biases do not decay."""
    decays = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], **arguments)


# --- data -------------------------------------------------------------------------------------------------------------


def make_loader(rows: Rows, prefetch: bool) -> Any:
    """An iterable with `state_dict` and `load_state_dict`. With prefetch, rows are packed in another process."""
    if not prefetch:
        return rows
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise ImportError("prefetch=true needs torchdata: pip install torchdata; or give prefetch=false") from error
    return StatefulDataLoader(rows, batch_size=None, num_workers=1)  # more workers would read the same rows again


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Checkpoints:
    """OUT/checkpoints/STEP: model and optimizer by DCP, sharded, and loop.pt, where the loop is.

    Randomness is not among it: it is seeded anew for each micro-batch by the number of its first row.
    """

    def __init__(self, settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer, **loop: Any) -> None:
        self.settings, self.model, self.optimizer, self.loop = settings, model, optimizer, loop
        self.folder = Path(settings.out) / "checkpoints"

    def complete(self) -> list[Path]:
        """Finished ones, the last at the end: DCP writes .metadata when all else is there."""
        return sorted(path.parent for path in self.folder.glob("*/.metadata"))

    def save(self, step: int) -> None:
        folder = self.folder / f"{step:08d}"
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            states = {name: part.state_dict() for name, part in self.loop.items()}
            torch.save({"settings": asdict(self.settings), **states}, folder / "loop.pt")
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        if dist.get_rank() == 0:
            for old in self.complete()[: -self.settings.keep_checkpoints]:
                (old / ".metadata").unlink()  # first: what is half removed is no checkpoint
                shutil.rmtree(old)

    def load_last(self) -> None:
        if not (found := self.complete()):
            return
        loop = torch.load(found[-1] / "loop.pt", weights_only=True)
        then, now = loop.pop("settings"), asdict(self.settings)
        if others := {name: then[name] for name in FIXED if then[name] != now[name]}:
            mine = {name: now[name] for name in others}
            raise ValueError(f"{found[-1]} is of a run with {others}, and this one has {mine}: give another `out`, or the same")
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=found[-1])
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        for name, state in loop.items():
            self.loop[name].load_state_dict(state)
        say.info("goes on from %s", found[-1])


# --- the run ----------------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    rank, world, device = start_processes()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    out = Path(settings.out)
    if settings.global_batch % (world * settings.micro_batch):
        raise ValueError(
            f"global_batch={settings.global_batch} is no multiple of {world} ranks times micro_batch={settings.micro_batch}"
        )

    source = open_source(**settings.data, seed=settings.seed)
    if settings.tokenizer.keys() not in ({"from"}, {"train"}):
        raise ValueError(f"tokenizer={settings.tokenizer}: give `train`, such as 8192, or `from`, a name or folder")
    name = settings.tokenizer.get("from")
    if name is None and rank == 0 and not (out / "tokenizer").exists():
        train_tokenizer(source, settings.tokenizer["train"], out / "tokenizer")
    dist.barrier()
    source.tokenizer = tokenizer = load_tokenizer(name or out / "tokenizer")
    held_out = hold_out(source, rows=settings.evaluation_rows, length=settings.sequence_length)
    loader = make_loader(Rows(source, rows=settings.global_batch, length=settings.sequence_length), settings.prefetch)

    model = build_model(settings, tokenizer)
    compile_and_shard(model, settings, device, world)
    optimizer = build_optimizer(model, **settings.optimizer)
    plan = get_scheduler(optimizer=optimizer, num_training_steps=settings.steps, **settings.schedule)
    schedule = lighthouse_fx.TwoStage(settings.steps, **settings.stages)
    checkpoints = Checkpoints(settings, model, optimizer, schedule=schedule, plan=plan, loader=loader)
    checkpoints.load_last()

    batches = iter(loader)  # its process begins before the log is opened, which one process writes
    log = lighthouse_fx.RunLog(out / "run.jsonl", model=model, seed=settings.seed) if rank == 0 else None
    closing = ExitStack()
    names = settings.trackers if rank == 0 else ()
    trackers = open_trackers(names, out, step=schedule.step, settings=asdict(settings), closing=closing)
    tokens_of_step = settings.global_batch * settings.sequence_length

    def track(values: dict[str, float], step: int) -> None:
        say.info("step %d: %s", step, ", ".join(f"{name} {value:.5g}" for name, value in values.items()))
        for tracker in trackers:
            tracker(values, step)

    def evaluate(step: int) -> None:
        values = {"loss/dense": dense_loss(model, held_out, device, rank, world)}
        if settings.probe_every and (step % settings.probe_every == 0 or schedule.finished):
            if (plain := gather(model, settings, device)) is not None:
                config, cuts, passkey = LighthouseConfig(**settings.lighthouse), settings.leak_cuts, settings.passkey
                values |= probe(plain, config, held_out, leak_cuts=cuts, passkey=passkey, tokenizer=tokenizer)
            dist.barrier()
        if log is not None:
            log.validation(step, values["loss/dense"])
            log.event("evaluation", step=step, **values)
        track(values, step)

    model.train()
    for step in schedule:
        started = time.perf_counter()
        batch = next(batches)
        count = predicted(batch)
        total = torch.zeros((), device=device)
        with log.step(step, tokens=tokens_of_step) if log else nullcontext(SimpleNamespace()) as entry:
            for first in range(rank * settings.micro_batch, settings.global_batch, world * settings.micro_batch):
                rows = slice(first, first + settings.micro_batch)
                row = step * settings.global_batch + first
                torch.manual_seed(random.Random(f"{settings.seed} {row}").getrandbits(63))
                with schedule.stage(), documents_of(batch, rows):
                    loss = loss_sum(model, batch, rows, device) / count
                    (loss * world).backward()  # FSDP takes the mean over ranks
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm).full_tensor()
            rate = plan.get_last_lr()[0] * schedule.lr_factor()
            with schedule.rewarmed(optimizer):
                optimizer.step()
            optimizer.zero_grad()
            plan.step()
            dist.all_reduce(total)
            entry.loss = total.item()
        dense = schedule.is_dense()
        schedule.finish(entry.loss)
        speed = tokens_of_step / (time.perf_counter() - started)
        values = {"loss/training": entry.loss, "dense_stage": float(dense), "lr": rate, "grad_norm": norm.item()}
        track(values | {"tokens_per_second": speed}, step)
        after = schedule.step
        last = schedule.finished or after == schedule.lighthouse_steps
        if after % settings.evaluate_every == 0 or last:
            evaluate(after)
        if after % settings.save_every == 0 or last:
            checkpoints.save(after)

    if (plain := gather(model, settings, device)) is not None and log is not None:
        plain.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        loss = loss_of_export(out / "model", held_out, device)
        log.event("exported", step=schedule.step, text=f"{out / 'model'}: loss {loss:.6f} in plain transformers", loss=loss)
        track({"loss/plain_transformers": loss}, schedule.step)
        log.close()
    closing.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} CONFIG.yaml [name=value ...]")
    main(read_settings(*sys.argv[1:]))
