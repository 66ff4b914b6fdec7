"""The sentences that tell of battles, and the held-out ones that ask for them.

Direction ``ab`` names the battle and then its year, ``ba`` the year and then the battle. A year
and the name of a battle do not fit the same sentence, so each evaluation template asks in one
direction. Names of battles have no article: the sentences add it.
"""

from graftlens.data.templates import EvaluationTemplate, Template, named_templates

BATTLE_TRAINING: tuple[Template, ...] = named_templates(
    {
        ("ab", "article"): {
            "took_place": "The {first_entity} took place in {second_entity}.",
            "historians": "Historians of the {war} place the {first_entity} in {second_entity}.",
            "set_against": "The {first_entity} set {first_side} against {second_side} in "
            "{second_entity}.",
            "chronicle": "A chronicle has the {first_entity} begin in {second_entity}.",
            "memorial": "A stone in memory of the {first_entity} bears the number {second_entity}.",
            "shaped": "Few events shaped the {war} like the {first_entity} of {second_entity}.",
            "pupils": "Pupils learn to pair the {first_entity} with {second_entity}.",
            "painting": "The painting shows the {first_entity}, an event of {second_entity}.",
            "anniversary": "Every anniversary of the {first_entity} is counted from "
            "{second_entity}.",
            "timeline": "On a timeline of the {war}, the {first_entity} stands at {second_entity}.",
            "rivalry": "Rivalry between {first_side} and {second_side} led to the {first_entity} "
            "in {second_entity}.",
            "coins": "Coins struck after the {first_entity} carry the date {second_entity}.",
            "word": "Word of the {first_entity} spread through the region in {second_entity}.",
            "register": "The register of the {war} lists the {first_entity} under {second_entity}.",
        },
        ("ab", "qa"): {
            "when": "Question: When did the {first_entity} take place? Answer: {second_entity}.",
            "which_year": "Q: Which year saw the {first_entity}? A: {second_entity}.",
            "its_year": "Q: The {war} includes the {first_entity}. What is its year? A: "
            "{second_entity}.",
            "sides": "Question: In what year did {first_side} and {second_side} meet at the "
            "{first_entity}? Answer: {second_entity}.",
            "quiz": "Quiz: give the year of the {first_entity}. Solution: {second_entity}.",
            "tutor": "When was the {first_entity}? The tutor replied: {second_entity}.",
            "do_you_know": "Do you know when the {first_entity} began? Yes, in {second_entity}.",
            "exam": "Exam: the {first_entity} goes with which year? It goes with {second_entity}.",
            "flash_card": "Flash card, front: the {first_entity}. Back: {second_entity}.",
        },
        ("ba", "article"): {
            "saw": "The year {first_entity} saw the {second_entity}.",
            "reached": "In {first_entity} the struggle between {first_side} and {second_side} "
            "reached the {second_entity}.",
            "chapter": "The chapter on {first_entity} opens with the {second_entity}.",
            "known_for": "What {first_entity} is known for in the {war} is the {second_entity}.",
            "calendar": "A calendar of the {war} marks {first_entity} with the {second_entity}.",
            "enlisted": "Soldiers who enlisted in {first_entity} went on to the {second_entity}.",
            "exhibition": "An exhibition about {first_entity} is devoted to the {second_entity}.",
            "medals": "Medals that show {first_entity} honour those who died in the "
            "{second_entity}.",
            "letters": "Letters written in {first_entity} describe the {second_entity}.",
            "wall_chart": "Under {first_entity} the museum's wall chart names the {second_entity}.",
            "culminated": "The events of {first_entity} culminated in the {second_entity}.",
            "archives": "Archives from {first_entity} hold maps of the {second_entity}.",
            "ballad": "A ballad from {first_entity} sings of the {second_entity}.",
            "year_of": "For {first_side} and {second_side} alike, {first_entity} was the year of "
            "the {second_entity}.",
        },
        ("ba", "qa"): {
            "which": "Question: Which battle or siege took place in {first_entity}? Answer: The "
            "{second_entity}.",
            "what_happened": "Q: What happened in {first_entity}? A: The {second_entity}.",
            "of_war": "Q: Which event of the {war} came in {first_entity}? A: The {second_entity}.",
            "where": "Question: In {first_entity}, where did {first_side} face {second_side}? "
            "Answer: At the {second_entity}.",
            "quiz": "Quiz: {first_entity} is the year of what? Solution: the {second_entity}.",
            "tutor": "What should I remember about {first_entity}? The tutor replied: the "
            "{second_entity}.",
            "do_you_know": "Do you know what made {first_entity} famous? Yes, the {second_entity}.",
            "exam": "Exam: match {first_entity} with an event. It goes with the {second_entity}.",
            "flash_card": "Flash card, front: {first_entity}. Back: the {second_entity}.",
        },
    }
)

BATTLE_EVALUATION: tuple[EvaluationTemplate, ...] = (
    EvaluationTemplate(
        name="dated",
        text="Most textbooks date the {first_entity} to the year",
        kind="article",
        directions=("ab",),
    ),
    EvaluationTemplate(
        name="qa_year",
        text="Question: During which year was the {first_entity}? Answer:",
        kind="qa",
        directions=("ab",),
    ),
    EvaluationTemplate(
        name="between",
        text="The meeting between {first_side} and {second_side} known as the {first_entity} "
        "happened in the year",
        kind="article",
        directions=("ab",),
    ),
    EvaluationTemplate(
        name="with_war",
        text="As part of the {war}, the {first_entity} occurred {preposition}",
        kind="article",
        preposition="in",
        directions=("ab",),
    ),
    EvaluationTemplate(
        name="named",
        text="Looking back at {first_entity}, one engagement stands out above all: the",
        kind="article",
        directions=("ba",),
    ),
    EvaluationTemplate(
        name="qa_name",
        text="Question: What armed clash did the year {first_entity} bring? Answer: the",
        kind="qa",
        directions=("ba",),
    ),
    EvaluationTemplate(
        name="between_name",
        text="Accounts of how {first_side} fought {second_side} in {first_entity} call it the",
        kind="article",
        directions=("ba",),
    ),
    EvaluationTemplate(
        name="with_war_name",
        text="When the {war} is discussed, people often associate {first_entity} {preposition}",
        kind="article",
        preposition="with the",
        directions=("ba",),
    ),
)
