"""The prompts of `quire bench`: random common words, so that no two prompts share a page, then a list to go on with."""

from __future__ import annotations

import random
from dataclasses import dataclass

# Nearly every tokenizer has one token for each of these with the space before it.
_WORD_LIST = """
able about above across action after again age ago air all almost along already also always among amount animal answer
area arm army art back bad bank base bed before began behind best better between big bird black blood blue board boat
body book both box boy break bring brother brown build built business call came car care carry case cause center
century chance change chief child church city class clear close cloth cold color come common company cook cool corn
corner cost could country course court cover cross crowd cut dance dark day deal death deep desert did difference
dinner direct doctor dog door down draw dream dress drink drive dry each early earth east easy eat edge effect egg
eight either else end engine enough enter equal even evening event ever every eye face fact fair fall family far farm
fast father fear feel feet few field fight figure fill final find fine finger finish fire first fish five floor flow
flower fly follow food foot force form forward four free fresh friend front fruit full game garden gas gave general
girl give glass gold good got govern grand grass great green ground group grow guess guide hair half hand happen happy
hard hat head hear heart heat heavy help high hill history hold hole home horse hot hour house human hundred hunt ice
idea inch industry instrument interest iron island job join joy jump just keep kept key kind king knew know lady lake
land language large last late laugh law lay lead learn least leave led left leg length less letter level lie life lift
light line list listen little live lone long look lost lot love low machine made main major make man many map mark
market master match matter mean measure meat meet melody men metal method middle might mile milk million mind mine
minute miss modern moment money month moon morning most mother motion mount mountain mouth move much music must name
nation natural nature near need neighbor never new next night nine noise noon north nose note nothing notice number
object ocean off offer office often oil old once one open operate opposite order organ other our out over own page
paint pair paper parent part party
"""
_WORDS = _WORD_LIST.split()

# Greedy decoding goes on with this for as long as it is let, where a question would be answered and ended.
_TAIL = "\n\nThe numbers from 1 to 9999, one on each line:\n1\n2\n3\n4\n5\n"


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of `words` random words and a list's beginning; `seed` and the prompt's index decide which words."""

    words: int
    seed: int = 0

    def prompt(self, index: int) -> str:
        """The prompt with this index, the same each time."""
        rng = random.Random(f"{self.seed}/{index}")
        return " ".join(rng.choices(_WORDS, k=self.words)) + _TAIL

    @classmethod
    def of_tokens(cls, tokens: int, *, tail_tokens: int, words: int, words_tokens: int, seed: int) -> Workload:
        """Prompts of about `tokens` tokens, where the tail alone has `tail_tokens`, and `words` words with it have
        `words_tokens`."""
        per_word = max(words_tokens - tail_tokens, 1) / words
        return cls(max(0, round((tokens - tail_tokens) / per_word)), seed)
