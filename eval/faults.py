"""``python -m eval faults``: kill a store at random moments, damage its files, and look whether anything is lost or wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numba
import torch
import typer
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from alaya_hf import AlayaConfig, AlayaDB
from alaya_hf.errors import AlayaError, CorruptStoreError
from eval.environment import describe

LAYERS, KV_HEADS, HEADS, DIM = 2, 2, 4, 16
SETTINGS = AlayaConfig(window=(4, 16), min_context=0)
FAMILIES = 3


def tiny_model() -> Any:
    """A model whose only use is its fingerprint."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=HEADS * DIM,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
    )
    return LlamaForCausalLM(config).eval()


def document(number: int) -> list[int]:
    """Token ids that a number stands for; documents of one family begin alike."""
    family = random.Random(number % FAMILIES)
    common = [family.randrange(4096) for _ in range(700)]
    own = random.Random(1000 + number)
    return common[: own.randrange(300, 700)] + [own.randrange(4096) for _ in range(own.randrange(20, 600))]


def vectors(ids: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that follow from the token ids and positions, per layer ``[1, kv_heads, n, head_dim]``."""
    token = torch.tensor(ids, dtype=torch.float32).view(1, 1, -1, 1)
    position = torch.arange(len(ids), dtype=torch.float32).view(1, 1, -1, 1)
    channel = torch.arange(DIM, dtype=torch.float32)
    head = torch.arange(KV_HEADS, dtype=torch.float32).view(1, -1, 1, 1)

    def wave(a: float, b: float) -> Tensor:
        return torch.sin(token * a + position * b + head * 0.7 + channel * 0.31)

    return [(wave(0.37 + layer, 0.11), wave(0.53, 0.23 + layer)) for layer in range(LAYERS)]


def answer(session: Any, steps: int = 3) -> list[Tensor]:
    """What a session says to fixed queries, layer by layer."""
    generator = torch.Generator().manual_seed(5)
    said = []
    for _ in range(steps):
        for layer in range(LAYERS):
            q, k, v = (torch.randn(1, n, 1, DIM, generator=generator) * 2 for n in (HEADS, KV_HEADS, KV_HEADS))
            session.update(q, k, v, layer)
            said.append(session.attention(q, layer))
    return said


def in_child(work: Callable[[], Any], timeout: float = 120) -> tuple[Any, int]:
    """Run something in a fork and return what it returned (None if it died) and its wait status."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            with os.fdopen(write, "w") as out:
                json.dump(work(), out)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as answer_of:
        text = answer_of.read()
    _, status = os.waitpid(child, 0)
    return (json.loads(text) if text else None), status


# Kills ----------------------------------------------------------------------------------------------------------------


def _work(path: Path, model: Any, seed: int, log: int) -> None:
    """Store, delete and sweep without end, saying what is about to be done and what was done."""
    chance = random.Random(seed)

    def say(*words: object) -> None:
        os.write(log, (" ".join(map(str, words)) + "\n").encode())

    with AlayaDB(path, model=model, settings=SETTINGS) as db:
        say("ready")
        while True:
            rows = db.list()
            dice = chance.random()
            if dice < 0.6 or len(rows) < 3:
                number = chance.randrange(10**6)
                ids = document(number)
                say("store", number)
                db.import_context(ids, vectors(ids), name=f"doc-{number}")
                say("stored", number)
            elif dice < 0.85:
                name = chance.choice(rows).name
                say("delete", name.split("-")[1])
                db.delete(name)
                say("deleted", name.split("-")[1])
            else:
                say("gc")
                report = db.gc(int(db.nbytes * chance.choice([0.7, 0.9, 1.0])))
                for name in report.contexts:
                    say("deleted", name.split("-")[1])
                say("swept")


def look(path: Path, model: Any) -> dict[str, Any]:
    """Read every context of a store and compare it with what its name stands for."""
    torch.set_num_threads(1)
    with AlayaDB(path, model=model, settings=SETTINGS) as db:
        problems = list(db.verify().problems)
        names = []
        for row in db.list():
            number = int(row.name.split("-")[1])
            names.append(number)
            ids = document(number)
            session, _ = db.create_session(context=row.id)
            if session.token_ids[0].tolist() != ids:
                problems.append(f"{row.name} has other tokens")
                continue
            for layer, (keys, values) in zip(session.layers, vectors(ids), strict=True):
                k, v = layer.contents()
                if not torch.equal(k, keys) or not torch.equal(v, values):
                    problems.append(f"{row.name} has other vectors")
        report = db.gc()
        problems += db.verify().problems
    left = len(list((path / "staging").iterdir()))
    return {"names": names, "problems": problems, "leftovers": report.leftovers, "staging": left}


def kill_campaign(
    kills: int, folder: Path, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Kill a process that stores, deletes and sweeps, again and again, and look at the store after each time.

    Parameters
    ----------
    kills : int
    folder : Path
        For the store; it goes on from kill to kill.
    seed : int
    advance : callable
        Called after each kill.

    Returns
    -------
    dict
        ``kills``, what was going on (``during``), ``leftovers`` of interrupted writes that were swept, and ``problems``: all
        contexts lost, changed or half visible.
    """
    model = tiny_model()
    chance = random.Random(seed)
    during: Counter[str] = Counter()
    must: set[int] = set()
    problems: list[str] = []
    leftovers = stored = 0
    for number in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                _work(folder, model, seed * 100_003 + number, write)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(write)
        with os.fdopen(read) as said:
            first = said.readline()
            time.sleep(chance.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
            lines = said.read().splitlines()
        os.waitpid(child, 0)
        if first != "ready\n":
            problems.append(f"kill {number}: the worker did not start")
            break
        # A line may itself have been cut short only at its end, which is the operation that was going on.
        may: set[int] = set()
        sweeping = False
        current = "nothing"
        for line in lines:
            verb, *rest = line.split()
            current = {"store": "store", "delete": "delete", "gc": "gc"}.get(verb, "between")
            if verb == "gc":
                sweeping = True
            elif verb == "swept":
                sweeping = False
            elif verb == "store":
                may.add(int(rest[0]))
            elif verb == "stored":
                must.add(int(rest[0]))
                may.discard(int(rest[0]))
                stored += 1
            elif verb == "delete":
                must.discard(int(rest[0]))
                may.add(int(rest[0]))
            elif verb == "deleted":
                must.discard(int(rest[0]))
                may.discard(int(rest[0]))
        during[current] += 1
        seen, status = in_child(lambda: look(folder, model))
        if seen is None:
            problems.append(f"kill {number} (during {current}): looking at the store failed, status {status}")
            break
        names = set(seen["names"])
        problems += [f"kill {number} (during {current}): {problem}" for problem in seen["problems"]]
        if names - must - may:
            problems.append(
                f"kill {number} (during {current}): contexts that were deleted are back: {names - must - may}"
            )
        if must - names and not sweeping:
            problems.append(f"kill {number} (during {current}): contexts are lost: {must - names}")
        if seen["staging"]:
            problems.append(f"kill {number} (during {current}): {seen['staging']} staging folders were not swept")
        leftovers += seen["leftovers"]
        must = names
        advance()
    return {
        "kills": sum(during.values()),
        "during": dict(during),
        "stored": stored,
        "leftovers": leftovers,
        "problems": problems,
    }


# Damage ---------------------------------------------------------------------------------------------------------------


def _try(path: Path, model: Any, ids: list[int], expected: list[Tensor], files: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    outcome, message = "", ""
    try:
        with AlayaDB(path, model=model, settings=SETTINGS) as db:
            session, rest = db.create_session([*ids, 1])
            if session.reused == 0:
                outcome = "not found"
            elif session.reused != len(ids):
                known = torch.cat([session.layers[0].contents()[side] for side in (0, 1)])
                same = torch.cat([vectors(ids)[0][side] for side in (0, 1)])[:, :, : session.reused]
                outcome = "found in part" if torch.equal(known, same) else "wrong"
            else:
                said = answer(session)
                outcome = "same" if all(map(torch.equal, said, expected)) else "wrong"
    except CorruptStoreError as error:
        outcome, message = "refused", str(error)
        if files and not ("context" in message and ("layer" in message or "segment" in message)):
            outcome = "refused without a name"
    except AlayaError as error:
        outcome, message = "refused", str(error)
    detected = True
    if files:
        with AlayaDB(path, model=model, settings=SETTINGS) as db:
            detected = bool(db.verify().problems)
            # The rest of the store stays usable.
            other, _ = db.create_session(context="doc-other")
            if not torch.equal(other.layers[0].contents()[0], vectors(document(1))[0][0]):
                outcome = "wrong"
    return {"outcome": outcome, "detected": detected, "message": message}


def damage_campaign(
    trials: int, folder: Path, seed: int = 0, advance: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Flip a byte or truncate a file of a stored context, ask it, and look whether a wrong answer comes.

    Parameters
    ----------
    trials : int
        Three of four damage vector files, every fourth the catalog.
    folder : Path
        For the store and its damaged copies.
    seed : int
    advance : callable

    Returns
    -------
    dict
        ``outcomes`` per kind of damage; ``undetected``: damaged vector files that ``verify`` passed; ``wrong`` answers.
    """
    model = tiny_model()
    ids = document(0)
    sound, copy = folder / "sound", folder / "copy"

    def prepare() -> list[Any]:
        torch.set_num_threads(1)
        with AlayaDB(sound, model=model, settings=SETTINGS) as db:
            db.import_context(ids, vectors(ids), name="doc")
            other = document(1)
            db.import_context(other, vectors(other), name="doc-other")
            session, _ = db.create_session([*ids, 1])
            assert session.reused == len(ids)
            segment = session.chain.links[-1].segment
            said = answer(session)
            assert not db.verify().problems
        return [segment, [tensor.tolist() for tensor in said]]

    (segment, said), _ = in_child(prepare)
    expected = [torch.tensor(values) for values in said]
    chance = random.Random(seed)
    outcomes: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    undetected: list[str] = []
    for number in range(trials):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound, copy)
        in_catalog = number % 4 == 3
        targets = [copy / "catalog.sqlite"] if in_catalog else sorted((copy / "segments" / segment).iterdir())
        target = chance.choice(targets)
        size = target.stat().st_size
        truncated = chance.random() < 0.25
        with target.open("r+b") as file:
            at = chance.randrange(size)
            if truncated:
                file.truncate(at)
            else:
                file.seek(at)
                byte = file.read(1)[0]
                file.seek(at)
                file.write(bytes([byte ^ (1 << chance.randrange(8)) if chance.random() < 0.5 else (byte + 128) % 256]))
        kind = f"{'catalog' if in_catalog else 'vectors'}, {'truncated' if truncated else 'byte flipped'}"
        result, status = in_child(lambda: _try(copy, model, ids, expected, not in_catalog))  # noqa: B023
        outcome = f"died with status {status}" if result is None else result["outcome"]
        outcomes.setdefault(kind, Counter())[outcome] += 1
        where = f"trial {number}: {kind} at {at} of {size} in {target.name}: {outcome}"
        if outcome not in ("refused", "same", "not found", "found in part"):
            wrong.append(where)
        if result is not None and not result["detected"]:
            undetected.append(where)
        advance()
    shutil.rmtree(copy, ignore_errors=True)
    return {
        "trials": trials,
        "outcomes": {kind: dict(count) for kind, count in sorted(outcomes.items())},
        "wrong": wrong,
        "undetected": undetected,
    }


def faults(
    kills: Annotated[int, typer.Option(min=0, help="Processes killed (SIGKILL) at random moments.")] = 500,
    damages: Annotated[int, typer.Option(min=0, help="Byte flips and truncations.")] = 200,
    seed: Annotated[int, typer.Option(help="Of everything random but the moment of a kill.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Where the stores lie. [default: a temporary folder]")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("results/faults"),
) -> None:
    """Kill a store at random moments and damage its files: nothing may be lost, nothing wrong attached."""
    torch.set_num_threads(1)
    # The one threading layer that survives a fork; kernels are loaded here, so that kills hit the store and not their loading.
    numba.config.THREADING_LAYER = "workqueue"
    numba.set_num_threads(1)
    with tempfile.TemporaryDirectory() as elsewhere, AlayaDB(elsewhere, model=tiny_model(), settings=SETTINGS) as db:
        stored = db.import_context(document(0), vectors(document(0)))
        answer(db.create_session(context=stored.id)[0])
    with tempfile.TemporaryDirectory(dir=folder) as temporary, Progress() as progress:
        task = progress.add_task("kills", total=kills)
        killed = kill_campaign(kills, Path(temporary) / "kills", seed, lambda: progress.advance(task))
        task = progress.add_task("damages", total=damages)
        damaged = damage_campaign(damages, Path(temporary), seed, lambda: progress.advance(task))
    text = report(killed, damaged)
    output.mkdir(parents=True, exist_ok=True)
    (output / "faults.md").write_text(text, encoding="utf-8")
    (output / "faults.json").write_text(json.dumps({"kills": killed, "damages": damaged}, indent=1), encoding="utf-8")
    typer.echo(text)
    if killed["problems"] or damaged["wrong"] or damaged["undetected"]:
        raise typer.Exit(code=1)


def report(killed: dict[str, Any], damaged: dict[str, Any]) -> str:
    """The page that says what happened."""
    lines = [describe(), "", "## Kills", "", "| | |", "| --- | --- |"]
    lines.append(f"| processes killed (SIGKILL) while they stored, deleted and swept | {killed['kills']} |")
    lines += [f"| … during {what} | {count} |" for what, count in sorted(killed["during"].items())]
    lines.append(f"| contexts stored | {killed['stored']} |")
    lines.append(f"| folders left by interrupted writes, swept | {killed['leftovers']} |")
    lines.append(f"| contexts lost, changed, half visible or back after their deletion | {len(killed['problems'])} |")
    lines += ["", *(f"* {problem}" for problem in killed["problems"])]
    names = sorted({name for counts in damaged["outcomes"].values() for name in counts})
    lines += ["## Damage", "", f"| damage | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for kind, counts in damaged["outcomes"].items():
        lines.append(f"| {kind} | {' | '.join(str(counts.get(name, 0)) for name in names)} |")
    lines += ["", f"Wrong answers: {len(damaged['wrong'])}. Damaged vector files that `verify` passed: "]
    lines[-1] += f"{len(damaged['undetected'])}."
    lines += ["", *(f"* {problem}" for problem in damaged["wrong"] + damaged["undetected"])]
    return "\n".join(lines).rstrip() + "\n"
