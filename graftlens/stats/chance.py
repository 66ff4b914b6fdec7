"""What a guess achieves where few answers are possible."""

from collections.abc import Iterable

#: Up to so many possible answers, a guess among them is among the five likeliest half of the time.
FEW = 10


def few_answers(answers: Iterable[str | None]) -> list[str]:
    """Of prompts with few different answers, what that makes of top-5 accuracy, in a sentence.

    Args:
        answers: each prompt's answer, None where it has none.

    Returns:
        One sentence, or none where more than `FEW` answers are possible.
    """
    count = len({answer for answer in answers if answer is not None})
    if not 0 < count <= FEW:
        return []
    return [
        f"These prompts have {count} possible answer{'s' if count > 1 else ''}, so a model that "
        f"only guesses among them is right by top-5 in {min(1, 5 / count):.0%} of the prompts. "
        "Judge by top-1 accuracy or by recovery instead."
    ]
