"""Legal data sets as plain dictionaries, from local copies or from where their authors publish them."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

CONTRACT_NLI_URL = "https://stanfordnlp.github.io/contract-nli/resources/contract-nli.zip"
LEXSUM = "releases/v20230518"
NLI_SPLITS = ("train", "dev", "test")
NLI_CHOICES = ("Entailment", "Contradiction", "NotMentioned")

Row = dict[str, Any]


class DataError(ValueError):
    """A file or a row that does not hold what its data set promises."""


class MissingData(DataError):
    """A data set that is not there: its file is not in the folder, or the download failed."""


class Source:
    """Reader of the legal data sets. Each is read once and kept.

    Parameters
    ----------
    data_dir : Path or None
        Folder with ``cuad.jsonl``, ``contract_nli_{dev,test}.json``, ``leval_legal_contract_qa.jsonl``,
        ``longbench_v2_legal.jsonl`` and ``multi_lexsum.jsonl``, each plain or with ``.gz``; a task needs its own file
        only. None: the files that the authors publish, through the Hugging Face hub's cache (ContractNLI from its
        home page).

    Notes
    -----
    The published files are read directly because three of the five sets come with loading scripts, which ``datasets``
    no longer runs. That path was written against the published layouts and is tested on small files of the same
    layout, not against the live hub. Multi-LexSum's sources are one file of 2.2 GB that is parsed as a whole.
    """

    def __init__(self, data_dir: Path | str | None = None) -> None:
        self.data_dir = None if data_dir is None else Path(data_dir)
        if self.data_dir is not None and not self.data_dir.is_dir():
            raise MissingData(f"{data_dir} is not a folder. Name the folder with the data sets, or none for the hub.")
        self._nli: dict[str, Row] = {}

    def contracts(self) -> list[Row]:
        """CUAD: ``{id, text, labels}``; ``labels[category]`` is ``{clauses, answer, spans}``.

        ``clauses`` are the annotated texts, ``spans`` are ``[start, end)`` character offsets into ``text``, ``answer``
        is the normalised answer (empty from the hub, whose copy has none). Source: Hendrycks et al. 2021, CUAD v1.

        Raises
        ------
        DataError, MissingData
        """
        return self._contracts

    def contract_nli(self, split: str = "test") -> Row:
        """ContractNLI: ``{documents, labels}`` as published (Koreeda & Manning 2021).

        ``documents[]`` has ``id``, ``text``, ``spans`` (character offsets) and ``annotation_sets[0].annotations``:
        per hypothesis a ``choice`` and the indices of its evidence among ``spans``. ``labels`` has the hypotheses.

        Raises
        ------
        DataError, MissingData
        """
        if split not in NLI_SPLITS:
            raise DataError(f"ContractNLI has no split {split!r}. Use one of {', '.join(NLI_SPLITS)}.")
        if split not in self._nli:
            self._nli[split] = self._read_nli(split)
        return self._nli[split]

    def leval_contract_qa(self) -> list[Row]:
        """L-Eval ``legal_contract_qa``: ``{id, input, instructions, outputs}`` (An et al. 2023).

        Raises
        ------
        DataError, MissingData
        """
        return self._leval

    def longbench_v2_legal(self) -> list[Row]:
        """LongBench v2, sub-domain Legal: ``{id, domain, question, choices, answer, context}`` (Bai et al. 2024).

        ``choices`` are four texts, ``answer`` is ``"A"`` to ``"D"``.

        Raises
        ------
        DataError, MissingData
        """
        return self._longbench

    def multi_lexsum(self) -> list[Row]:
        """Multi-LexSum, test split: ``{id, sources, summaries}`` (Shen et al. 2022).

        ``sources`` are the case's documents; ``summaries`` maps ``"short"`` and ``"tiny"`` to texts, where there are any.

        Raises
        ------
        DataError, MissingData
        """
        return self._lexsum

    @cached_property
    def _contracts(self) -> list[Row]:
        if self.data_dir is None:
            path = _hub("theatticusproject/cuad", "CUAD_v1/CUAD_v1.json")
            return list(_from_squad(_json(path), path))
        return self._rows("cuad.jsonl", _contract)

    def _read_nli(self, split: str) -> Row:
        if self.data_dir is not None:
            path = self._path(f"contract_nli_{split}.json")
            return _nli(_json(path), str(path))
        path = _download(CONTRACT_NLI_URL)
        member = f"contract-nli/{split}.json"
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                return _nli(json.load(file), f"{path}:{member}")
        except (KeyError, zipfile.BadZipFile, json.JSONDecodeError) as error:
            raise DataError(f"{path} is not ContractNLI's archive with {member}: {error}. Delete and retry.") from error

    @cached_property
    def _leval(self) -> list[Row]:
        if self.data_dir is None:
            return _parse(_hub("L4NLP/LEval", "LEval/Generation/legal_contract_qa.jsonl"), _leval)
        return self._rows("leval_legal_contract_qa.jsonl", _leval)

    @cached_property
    def _longbench(self) -> list[Row]:
        if self.data_dir is not None:
            return self._rows("longbench_v2_legal.jsonl", _longbench)
        path = _hub("THUDM/LongBench-v2", "data.json")
        rows = _json(path)
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of questions, got {type(rows).__name__}. Download it again.")
        legal = [
            (n, row) for n, row in enumerate(rows, 1) if isinstance(row, dict) and row.get("sub_domain") == "Legal"
        ]
        return [_longbench(row, f"{path}, row {n}") for n, row in legal]

    @cached_property
    def _lexsum(self) -> list[Row]:
        if self.data_dir is not None:
            return self._rows("multi_lexsum.jsonl", _lexsum)
        path = _hub("allenai/multi_lexsum", f"{LEXSUM}/test.json")
        sources_path = _hub("allenai/multi_lexsum", f"{LEXSUM}/sources.json")
        sources = _json(sources_path)

        def convert(row: Row, where: str) -> Row:
            texts = []
            for key in _field(row, "case_documents", list, where):
                if key not in sources:
                    raise DataError(f"{where}: source document {key!r} is not in {sources_path}. Download both again.")
                texts.append(_field(sources[key], "doc_text", str, f"{sources_path}, {key}"))
            return _lexsum({**row, "id": _field(row, "case_id", str, where), "sources": texts}, where)

        return _parse(path, convert)

    def _path(self, name: str) -> Path:
        assert self.data_dir is not None
        for path in (self.data_dir / f"{name}.gz", self.data_dir / name):
            if path.exists():
                return path
        raise MissingData(
            f"no {name}.gz and no {name} in {self.data_dir}. Put it there, or give no folder for the hub."
        )

    def _rows(self, name: str, convert: Callable[[Row, str], Row]) -> list[Row]:
        return _parse(self._path(name), convert)


def _hub(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    # The client raises its own, httpx's and the operating system's errors; all mean the same here.
    except Exception as error:
        raise MissingData(
            f"could not get {name} of the data set {repository} from the hub: {error}. "
            "Check the connection, or give a folder with a local copy."
        ) from error


def _download(url: str) -> Path:
    try:
        from datasets import DownloadManager

        return Path(DownloadManager().download(url))
    except Exception as error:
        raise MissingData(
            f"could not get {url}: {error}. Check the connection, or give a local copy's folder."
        ) from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _json(path: Path) -> Any:
    try:
        with _open(path) as file:
            return json.load(file)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path} is not valid JSON: {error}. Fetch the file again.") from error


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"{path}, line {number} is not valid JSON: {error}. Fetch the file again.") from error


def _parse(path: Path, convert: Callable[[Row, str], Row]) -> list[Row]:
    rows = [convert(row, where) for where, row in _lines(path)]
    if not rows:
        raise DataError(f"{path} has no rows. Fetch the file again.")
    return rows


def _field(row: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a row, or a DataError that says which one is missing or of the wrong type, and where."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}. Correct or remove the row.")
    if name not in row:
        raise DataError(f"{where}: field {name!r} is missing (fields: {', '.join(row)}). Correct or remove the row.")
    value = row[name]
    if not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(
            f"{where}: field {name!r} is {type(value).__name__}, expected {wanted}. Correct or remove the row."
        )
    return value


def _texts(row: Any, name: str, where: str) -> list[str]:
    values = _field(row, name, list, where)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: field {name!r} has an entry that is not text. Correct or remove the row.")
    return values


def _checked_spans(spans: Iterable[Any], size: int, where: str) -> list[tuple[int, int]]:
    checked = []
    for span in spans:
        if not (isinstance(span, list | tuple) and len(span) == 2 and all(isinstance(x, int) for x in span)):
            raise DataError(f"{where}: span {span!r} is not a pair of integers. Correct or remove the row.")
        start, end = span
        if not 0 <= start < end <= size:
            raise DataError(f"{where}: span {span!r} is outside the text of {size} characters. Correct or remove it.")
        checked.append((start, end))
    return checked


def _contract(row: Row, where: str) -> Row:
    text = _field(row, "text", str, where)
    labels = {}
    for category, label in _field(row, "labels", dict, where).items():
        here = f"{where}, category {category!r}"
        labels[category] = {
            "clauses": _texts(label, "clauses", here),
            "answer": _field(label, "answer", str, here),
            "spans": _checked_spans(_field(label, "spans", list, here), len(text), here),
        }
    return {"id": _field(row, "id", str, where), "text": text, "labels": labels}


def _from_squad(published: Any, path: Path) -> Iterator[Row]:
    """CUAD as published: SQuAD 2.0, one paragraph a contract, question ids ``<title>__<category>``."""
    for number, entry in enumerate(_field(published, "data", list, str(path)), 1):
        where = f"{path}, contract {number}"
        title = _field(entry, "title", str, where)
        for paragraph in _field(entry, "paragraphs", list, where):
            text = _field(paragraph, "context", str, where)
            labels = {}
            for question in _field(paragraph, "qas", list, where):
                key = _field(question, "id", str, where)
                here = f"{where}, question {key!r}"
                clauses, spans = [], []
                for answer in _field(question, "answers", list, here):
                    clause, start = _field(answer, "text", str, here), _field(answer, "answer_start", int, here)
                    if clause and clause not in clauses:
                        clauses.append(clause)
                    spans.append((start, start + len(clause)))
                labels[key.rpartition("__")[2]] = {
                    "clauses": clauses,
                    "answer": "",
                    "spans": _checked_spans([s for s in spans if s[0] < s[1]], len(text), here),
                }
            yield {"id": title, "text": text, "labels": labels}


def _nli(data: Any, where: str) -> Row:
    hypotheses = _field(data, "labels", dict, where)
    for key, label in hypotheses.items():
        _field(label, "hypothesis", str, f"{where}, label {key!r}")
    documents = []
    for number, row in enumerate(_field(data, "documents", list, where), 1):
        here = f"{where}, document {number}"
        text = _field(row, "text", str, here)
        spans = _checked_spans(_field(row, "spans", list, here), len(text), here)
        sets = _field(row, "annotation_sets", list, here)
        if not sets:
            raise DataError(f"{here}: field 'annotation_sets' is empty. Correct or remove the row.")
        annotations = _field(sets[0], "annotations", dict, here)
        for key, annotation in annotations.items():
            place = f"{here}, hypothesis {key!r}"
            choice = _field(annotation, "choice", str, place)
            indices = _field(annotation, "spans", list, place)
            if key not in hypotheses:
                raise DataError(f"{place}: there is no such label in the file. Correct or remove the row.")
            if choice not in NLI_CHOICES:
                raise DataError(f"{place}: choice {choice!r} is none of {', '.join(NLI_CHOICES)}. Correct it.")
            if not all(isinstance(index, int) and 0 <= index < len(spans) for index in indices):
                raise DataError(f"{place}: evidence {indices} is not among the {len(spans)} spans. Correct it.")
        identity = str(_field(row, "id", (int, str), here))
        documents.append({**row, "id": identity, "text": text, "spans": spans})
    return {"documents": documents, "labels": hypotheses}


def _leval(row: Row, where: str) -> Row:
    instructions, outputs = _texts(row, "instructions", where), _texts(row, "outputs", where)
    if len(instructions) != len(outputs):
        raise DataError(f"{where}: {len(instructions)} instructions but {len(outputs)} outputs. Correct the row.")
    name = f"leval-{where.rpartition(' ')[2]}"
    return {"id": name, "input": _field(row, "input", str, where), "instructions": instructions, "outputs": outputs}


def _longbench(row: Row, where: str) -> Row:
    answer = _field(row, "answer", str, where)
    if answer not in ("A", "B", "C", "D"):
        raise DataError(f"{where}: answer {answer!r} is none of A, B, C, D. Correct or remove the row.")
    return {
        "id": _field(row, "_id", str, where),
        "domain": _field(row, "domain", str, where),
        "question": _field(row, "question", str, where),
        "choices": [_field(row, f"choice_{letter}", str, where) for letter in "ABCD"],
        "answer": answer,
        "context": _field(row, "context", str, where),
    }


def _lexsum(row: Row, where: str) -> Row:
    _field(row, "summary/long", str, where)
    summaries = {}
    for size in ("short", "tiny"):
        if row.get(f"summary/{size}"):
            summaries[size] = _field(row, f"summary/{size}", str, where).strip()
    return {"id": _field(row, "id", str, where), "sources": _texts(row, "sources", where), "summaries": summaries}
