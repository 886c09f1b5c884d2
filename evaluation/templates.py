"""The 80 sentences that CLIP's authors put ImageNet's class names into, as data.

Source: the prompt-engineering notebook of github.com/openai/CLIP (arXiv 2103.00020, section 3.1.4). 38 phrases
come with "a" and with "the", and four stand alone; their order does not matter, because prompts are averaged.

    prompts("goldfish")[:2]        # ('a bad photo of a goldfish.', 'a bad photo of the goldfish.')
"""

from __future__ import annotations

_WITH_BOTH_ARTICLES = (
    "a bad photo of {article} {name}.", "a sculpture of {article} {name}.", "a photo of {article} hard to see {name}.",
    "a low resolution photo of {article} {name}.", "a rendering of {article} {name}.", "graffiti of {article} {name}.",
    "a cropped photo of {article} {name}.", "a tattoo of {article} {name}.", "{article} embroidered {name}.",
    "a bright photo of {article} {name}.", "a photo of {article} clean {name}.", "a photo of {article} dirty {name}.",
    "a dark photo of {article} {name}.", "a drawing of {article} {name}.", "{article} plastic {name}.",
    "a photo of {article} cool {name}.", "a close-up photo of {article} {name}.",
    "a black and white photo of {article} {name}.", "a painting of {article} {name}.",
    "a pixelated photo of {article} {name}.", "a jpeg corrupted photo of {article} {name}.",
    "a blurry photo of {article} {name}.", "a photo of {article} {name}.", "a good photo of {article} {name}.",
    "{article} {name} in a video game.", "a doodle of {article} {name}.", "{article} origami {name}.",
    "a sketch of {article} {name}.", "{article} toy {name}.", "a rendition of {article} {name}.",
    "a photo of {article} large {name}.", "a photo of {article} nice {name}.", "a photo of {article} weird {name}.",
    "a photo of {article} small {name}.", "{article} cartoon {name}.", "art of {article} {name}.",
    "itap of {article} {name}.", "{article} plushie {name}.",
)  # fmt: skip
_ALONE = ("a photo of many {name}.", "a photo of my {name}.", "a photo of one {name}.", "itap of my {name}.")


def prompts(name: str) -> tuple[str, ...]:
    """The 80 sentences about the class called `name`."""
    both = [text.format(article=article, name=name) for text in _WITH_BOTH_ARTICLES for article in ("a", "the")]
    return (*both, *(text.format(name=name) for text in _ALONE))
