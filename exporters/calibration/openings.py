"""How the documents that a model writes itself begin.

A model that starts from nothing degenerates: it repeats one word, or writes endless lists. From a
few words of an ordinary sentence it writes ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dash_onnx.core.arrays import Ids

OPENINGS = (
    "The history of the city begins",
    "In 1954, the government of",
    "The novel is set in a small town where",
    "Scientists have long known that",
    "She closed the door behind her and",
    '"I never told you this," he said,',
    "The river rises in the mountains and flows",
    "During the war, the regiment was",
    "The album was released in",
    "According to a report published on Tuesday,",
    "The species is found in",
    "Once upon a time there was",
    "The company was founded by",
    "In this paper, we study",
    "The first thing you need to do is",
    "My grandmother used to say that",
    "The film received mixed reviews from critics, who",
    "To make the dough, mix the flour with",
    "The train was late again, and",
    "He was born in a village near",
    "The treaty was signed after",
    "Many people believe that",
    "It was raining when we arrived at",
    "The president told reporters that",
    "Photosynthesis is the process by which",
    "The old man looked at the sea and",
    "After the match, the coach said",
    "In mathematics, a group is",
    "Dear Sir or Madam,\n\n",
    "How to choose a bicycle\n\n",
    "Question: Why does ice float on water?\nAnswer:",
    "The main causes of the crisis were",
    "The building, which was designed by",
    "Patients with high blood pressure should",
    "At the beginning of the nineteenth century,",
    "The castle stands on a hill above",
    "The judge asked the witness whether",
    "As the sun went down, the travellers",
    "The new law requires that",
    "The band played their first concert in",
    "The Roman army",
    "We stayed at this hotel for three nights and",
    "The economy grew by",
    "Birds that live near the coast",
    "She had always wanted to become a doctor, but",
    "The storm reached the islands on",
    "I bought this camera last year and",
    "The theory was first proposed by",
    "There are several ways to learn a language.",
    "The king had three daughters, and",
    "# Installation\n\n",
    "def main():\n",
    "import numpy as np\n\n",
    "#include <stdio.h>\n\n",
    "<html>\n<head>\n",
    '{"name":',
    "Die Stadt liegt",
    "La première fois que",
    "El presidente de la",
    "Летом мы часто",
    "这座城市位于",
    "Il libro racconta",
    "A história da",
    "東京の",
)


def openings(
    encode: Callable[[str], Ids], count: int, length: int, generator: np.random.Generator
) -> list[tuple[int, ...]]:
    """First tokens of documents of many kinds and some languages.

    Args:
        encode: text -> token ids, including what the model's tokenizer puts before a text.
        count: number of documents; every opening is used once before any is reused.
        length: tokens per document, at least half of which the model writes.
        generator: determines their order.
    """
    order = np.concatenate(
        [generator.permutation(len(OPENINGS)) for _ in range(-(-count // len(OPENINGS)))]
    )
    most = max(length // 2, 1)
    found = [encode(OPENINGS[number])[:most].tolist() for number in order[:count]]
    return [tuple(ids) or (0,) for ids in found]  # a vocabulary may have none of the words
