"""The demo's document: licence agreements in full, and questions whose answers stand in them verbatim."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from alaya_hf.errors import AlayaError

LICENCES = ("CNRI-Jython", "QPL-1.0", "MTLL", "TORQUE-1.1", "TMate", "SCEA", "EUDatagrid")
"""SPDX identifiers of the agreements, in the order of the document."""


@dataclass(frozen=True)
class Question:
    """A question in completion style: the model continues a sentence of the document.

    Parameters
    ----------
    question : str
        What is asked.
    prefix : str
        The beginning of the answer, words of the document up to the fact asked for.
    answer : str or None
        What stands in the document after these words; None if unknown.
    """

    question: str
    prefix: str = ""
    answer: str | None = None

    @property
    def prompt(self) -> str:
        """What follows the document."""
        return f"\n\nQuestion: {self.question}\nAnswer: {self.prefix}".rstrip()

    def accepts(self, completion: str) -> bool:
        """Whether a completion begins with the answer, up to case and white space.

        Raises
        ------
        ValueError
            If no answer is known.
        """
        if self.answer is None:
            raise ValueError(f"the question {self.question!r} has no known answer to compare with. Give `answer`.")
        return normalise(completion).startswith(normalise(self.answer))


def normalise(text: str) -> str:
    """Lower case, white space collapsed."""
    return " ".join(text.lower().split())


# A model of 135M parameters answers by copying: each prefix is long enough to be found only once in the document.
QUESTIONS = (
    Question(
        "Under which URL may the JPython license be obtained?",
        "The License may also be obtained from a proxy server on the Web using the following URL:",
        "http://hdl.handle.net/1895.22",
    ),
    Question(
        "Who holds the copyright of the Q Public License?",
        "THE Q PUBLIC LICENSE version 1.0 Copyright (C) 1999-2005",
        "Trolltech AS, Norway",
    ),
    Question(
        "What is the intent of the Q Public License?",
        "The intent of this license is to establish freedom to share and change the software regulated by this license "
        "under the",
        "open source model",
    ),
    Question(
        "What does the section on the choice of law say?",
        "This license is governed by the Laws of Norway. Disputes shall be settled by",
        "Oslo City Court",
    ),
    Question(
        "Who wrote the Matrix Template Library?",
        "Authors: Peter",
        "Gottschling and Andrew Lumsdaine",
    ),
    Question(
        "Where should TORQUE users send questions?",
        "For free support for TORQUE users, questions should be emailed to the community of TORQUE users at",
        "torqueusers@supercluster.org",
    ),
    Question(
        "Who developed OpenPBS?",
        "TORQUE is a modification of OpenPBS which was developed by",
        "NASA Ames Research Center",
    ),
    Question(
        "Where can permission be asked for?",
        "Please, contact TMate Software at",
        "support@svnkit.com",
    ),
    Question(
        "In which county are actions brought?",
        "Any action or proceeding brought to enforce the terms of this Agreement shall be brought in the Superior "
        "Court of the County of",
        "San Mateo",
    ),
    Question(
        "Where is more information?",
        "For more information on the EU DataGrid, please see",
        "http://www.eu-datagrid.org",
    ),
)
"""Questions on :func:`licence_agreements`, answers at depths from 5 % to 89 %."""


def licence_agreements() -> str:
    """The texts of :data:`LICENCES` from the package ``spdx``, one after another; about 6,500 tokens of SmolLM2.

    Raises
    ------
    AlayaError
        If the package is missing or does not hold one of the agreements.
    """
    # The package's own lookup loads all licences and compares them; the files are plain text.
    spec = importlib.util.find_spec("spdx")
    if spec is None or spec.origin is None:
        raise AlayaError(
            "the demo's document comes from the package spdx, which is not installed. "
            "Run: pip install 'alaya_hf[demo]' (or pass --document FILE.txt)"
        )
    folder = Path(spec.origin).parent / "data"
    texts = []
    for name in LICENCES:
        path = folder / f"{name}.txt"
        if not path.is_file():
            raise AlayaError(
                f"the installed package spdx holds no agreement {name!r}, which version 2.5.1 does. "
                "Run: pip install spdx==2.5.1 (or pass --document FILE.txt)"
            )
        texts.append(path.read_text(encoding="utf-8").strip())
    return "\n\n".join(texts)
