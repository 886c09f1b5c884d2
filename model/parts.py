"""The modules that outlive training, under the Pretrainer's names; model/tokenizer.py gives them their methods.

with torch.device("meta"):
    Parts(config.model, frozenset({"trunk", "bottleneck"})).state_dict()    # which tensors, of which shapes
"""

from __future__ import annotations

from torch import nn

from configs.architecture import Model
from model.heads import ClipHeads
from model.latent import bottleneck, head_width
from model.text import TextTower
from model.towers import decoder_of, encoder_of

PARTS = ("trunk", "bottleneck", "decoder", "text", "clip")  # of a Pretrainer; the rest serves training only
TRAINING_ALONE = "decoder.mask_token"  # stands in for patches that objectives.rec.mask hides


def outlives_training(name: str) -> bool:
    """Whether a Pretrainer's tensor is one of the parts'."""
    return name.split(".")[0] in PARTS and name != TRAINING_ALONE


class Parts(nn.Module):
    """The student's modules, those that `parts` lists; the trunk is always there."""

    def __init__(self, model: Model, parts: frozenset[str], has_bias: bool = False, attention: str = "sdpa") -> None:
        super().__init__()
        self.model = model
        self.trunk = encoder_of(
            model, attention, align=1
        )  # padding serves training: with none any batch is one program
        self.bottleneck = bottleneck(model) if "bottleneck" in parts else None
        self.decoder = decoder_of(model, attention) if "decoder" in parts else None
        self.text = TextTower(model.text, model.clip_width, attention) if "text" in parts else None
        self.clip = ClipHeads(head_width(model), model.clip_width, has_bias) if "clip" in parts else None
