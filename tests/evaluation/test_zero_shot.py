"""Zero-shot accuracy on embeddings whose answer is known; class tables and templates."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs import UserError
from evaluation.plots import draw_confusion_matrix
from evaluation.zero_shot import CLIP_TEMPLATES, OWN_PROMPTS, ClassTable, ZeroShot, class_embeddings, imagenet_prompts
from model.losses.comm import Solo

pytestmark = pytest.mark.L0


def zero_shot(classes: int) -> ZeroShot:
    names = tuple(f"kind {i}" for i in range(classes))
    return ZeroShot(torch.eye(classes), ClassTable(names, tuple((name,) for name in names)), Solo())


def test_accuracy_counts_labelled_images_only(tmp_path: Path) -> None:
    task = zero_shot(8)
    images = torch.eye(8)[[0, 1, 2, 3]] + 0.1 * torch.eye(8)[[1, 0, 3, 7]]
    task.count(images, torch.tensor([0, 0, 2, -1]))  # right, second best, right, without a label
    outcome = task.result()
    figures = outcome.metrics
    assert figures["top1"] == pytest.approx(2 / 3)
    assert figures["top5"] == 1.0
    assert figures["chance"] == 1 / 8
    assert figures["times_chance"] == pytest.approx(16 / 3)
    assert (figures["classes"], figures["images"]) == (8, 3)
    assert figures["prompts"] == OWN_PROMPTS
    outcome.plots["zero_shot_confusion"](tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_a_confusion_matrix_has_room_for_the_names_of_its_classes(tmp_path: Path) -> None:
    names = [f"a class called {number}" for number in range(64)]
    draw_confusion_matrix(torch.eye(64).long(), names, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) / len(names) > 25, "pixels a class: letters of 9 points at 150 dots an inch have 19"


def test_the_five_best_are_told_from_the_rest() -> None:
    task = zero_shot(8)
    task.count(torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]] * 3), torch.tensor([4, 5, 0]))
    assert task.result().metrics["top5"] == pytest.approx(2 / 3)


class Words:
    """A tokenizer and its encoder: a prompt's embedding is what it says."""

    def encode(self, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([json.loads(prompt) for prompt in prompts])

    def embed_captions(self, ids: torch.Tensor) -> torch.Tensor:
        return ids


def test_a_class_is_the_normed_mean_of_its_prompts() -> None:
    words: Any = Words()
    found = class_embeddings(words, words, [["[1.0, 0.0]", "[0.0, 1.0]"], ["[0.6, 0.8]"]], torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))


def test_no_labels_is_an_error_and_not_a_number() -> None:
    task = zero_shot(4)
    task.count(torch.eye(4), torch.full((4,), -1))
    with pytest.raises(UserError, match="no held-out sample has a label"):
        task.result()


@pytest.mark.parametrize("label", [4, -2])
def test_a_label_outside_the_table_is_an_error(label: int) -> None:
    with pytest.raises(UserError, match=f"label {label}, the class table 4 classes"):
        zero_shot(4).count(torch.eye(4), torch.tensor([0, 1, label, 3]))


def test_names_without_prompts_are_put_into_the_80_templates(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": [{"name": "tench"}, {"name": "goldfish"}]}))
    table = ClassTable.read(path)
    assert table.names == ("tench", "goldfish")
    assert table.prompt_source == CLIP_TEMPLATES
    assert table.prompts[1] == imagenet_prompts("goldfish")


def test_there_are_80_different_templates_with_the_published_ones_among_them() -> None:
    prompts = imagenet_prompts("tench")
    assert len(prompts) == len(set(prompts)) == 80
    published = (
        "a bad photo of a tench.", "itap of my tench.", "the tench in a video game.", "a photo of one tench.",
        "a photo of many tench.", "a embroidered tench.", "art of the tench.", "a photo of the hard to see tench.",
    )  # fmt: skip
    assert set(published) <= set(prompts)


def test_class_tables_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"classes": [{"name": "red circle", "prompts": ["a red circle", "a red disc"]}]}))
    assert ClassTable.read(path) == ClassTable(("red circle",), (("a red circle", "a red disc"),))
    path.write_text(path.read_text(), encoding="utf-16")
    assert ClassTable.read(path) == ClassTable(("red circle",), (("a red circle", "a red disc"),))
    path.write_text(json.dumps({"classes": [{"name": "one", "prompts": ["a one"]}, {"name": "two"}]}))
    with pytest.raises(UserError, match=r"1 of 2 classes have no prompts \(first: 'two'\)"):
        ClassTable.read(path)
    for wrong, what in (
        ("{", "it is not JSON"),
        ("[]", "it has no list of `classes`"),
        ('{"classes": []}', "it has no list of `classes`"),
        ('{"classes": ["tench"]}', 'class 0 is "tench"'),
        ('{"classes": [{"prompts": ["a"]}]}', "class 0 is "),
        ('{"classes": [{"name": "tench"}, {"name": 3}]}', "class 1 is "),
        ('{"classes": [{"name": "tench", "prompts": "a tench"}]}', "class 0 is "),  # not a list of seven letters
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match="is no class table: " + re.escape(what)):
            ClassTable.read(path)
    with pytest.raises(UserError, match=r"^\S+missing.json cannot be read: .*--classes FILE$"):
        ClassTable.read(tmp_path / "missing.json")
