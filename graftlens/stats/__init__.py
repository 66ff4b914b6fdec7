"""How certain the numbers are: intervals, differences and p-values over prompts.

Every function takes the results table (one row per prompt and graft) and compares grafts *on the
same prompts*: a prompt counts only if it ran under every graft that is compared, and the prompts
left out are counted, not hidden. One set of resamples serves all grafts, so that the difficulty
of a prompt cancels out in differences and ratios (Efron & Tibshirani, *An Introduction to the
Bootstrap*, 1993, chapters 8 and 13).

What is resampled is the `unit`. By default that is the prompt, and prompts are taken as
independent. Where several prompts ask for one fact in different words, they are not: name the
column that says which fact each prompt is about (`unit="fact"`; in prompts made from facts the
column `answer` does), and whole facts are drawn, with all their prompts (the cluster bootstrap:
Davison & Hinkley, *Bootstrap Methods and their Application*, 1997, section 3.8; Field & Welsh 2007,
*JRSS B* 69, 369-390). With fewer than about 20 units its intervals are too narrow (Cameron, Gelbach
& Miller 2008, *Review of Economics and Statistics* 90, 414-427).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
