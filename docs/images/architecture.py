"""Draw the figure of the architecture, once for light and once for dark pages.

    python docs/images/architecture.py          # writes architecture-light.svg and architecture-dark.svg beside itself

Widths in the bar of packed tokens are those of the recipe: B clip images of 257 tokens, 2 x B/4 global crops of 257,
8 x B/4 local crops of 37.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 980, 684
LEFT, RIGHT = 20, 960
COLUMNS = {"clip": (20, 300), "ssl": (350, 300), "rec": (680, 280)}  # x, width
# role: (fill, stroke)
PALETTES = {
    "light": {
        "ink": ("#1f2328", "#59636e"),
        "plain": ("#f6f8fa", "#818b98"),
        "clip": ("#ddf4ff", "#0969da"),
        "ssl": ("#fbefff", "#8250df"),
        "rec": ("#dafbe1", "#1a7f37"),
    },
    "dark": {
        "ink": ("#f0f6fc", "#9198a1"),
        "plain": ("#151b23", "#656c76"),
        "clip": ("#0c2d5b", "#58a6ff"),
        "ssl": ("#33205c", "#bc8cff"),
        "rec": ("#0d3a1d", "#3fb950"),
    },
}


class Drawing:
    """An SVG drawing in one palette."""

    def __init__(self, palette: dict[str, tuple[str, str]]) -> None:
        self.palette = palette
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, role: str, *lines: str, dashed: bool = False
    ) -> None:
        """Draw a box with centred lines of text; the first one is bold."""
        fill, stroke = self.palette[role]
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="1.5"{dash}/>'
        )
        top = y + height / 2 - 9 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * number, line, is_bold=number == 0, is_muted=number > 0)

    def text(
        self, x: float, y: float, line: str, is_bold: bool = False, is_muted: bool = False, anchor: str = "middle"
    ) -> None:
        """Write one line, centred vertically on y."""
        ink, muted = self.palette["ink"]
        style = (' font-weight="600"' if is_bold else "") + f' font-size="{12.5 if is_muted else 14}"'
        self.parts.append(
            f'<text x="{x:g}" y="{y + 5:g}" text-anchor="{anchor}" fill="{muted if is_muted else ink}"{style}>'
            f"{escape(line)}</text>"
        )

    def arrow(self, *points: tuple[float, float], role: str = "plain", dashed: bool = False) -> None:
        """Draw a line through the points that ends in an arrow."""
        stroke = self.palette[role][1]
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(
            f'<path d="M{path}" fill="none" stroke="{stroke}" stroke-width="1.8"{dash} marker-end="url(#{role})"/>'
        )

    def svg(self, title: str) -> str:
        """Return the file's text."""
        heads = "".join(
            f'<marker id="{role}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{stroke}"/></marker>'
            for role, (_, stroke) in self.palette.items()
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img">\n'
            f"<title>{escape(title)}</title>\n<defs>{heads}</defs>\n{body}\n</svg>\n"
        )


def draw(palette: dict[str, tuple[str, str]]) -> str:
    """Return the figure: from shards to the optimizer step, top to bottom."""
    picture = Drawing(palette)
    _input(picture)
    _packed_sequence(picture)
    picture.box(LEFT, 292, 940, 48, "plain")
    picture.text(LEFT + 14, 316, "shared trunk: one ViT pass over the packed sequence", is_bold=True, anchor="start")
    picture.text(RIGHT - 14, 316, "ZeRO-3: one parameter gather per block and direction", is_muted=True, anchor="end")
    _branches(picture)
    _losses(picture)
    return picture.svg(
        "Shards, loader, packed batch, one shared trunk pass, heads, decoder and teacher, three losses, ZeRO engine"
    )


def _input(picture: Drawing) -> None:
    for offset in (8, 4, 0):
        picture.box(
            LEFT + offset, 24 - offset, 150, 52, "plain", *(("tar shards", "image + caption") if not offset else ())
        )
    picture.arrow((180, 50), (224, 50))
    picture.box(228, 24, 380, 52, "plain", "loader", "order = f(seed, position) · decode · crops · masks")
    picture.arrow((608, 50), (652, 50))
    picture.box(656, 24, 304, 52, "plain", "batch", "B images + captions, crops of B/4")
    picture.arrow((808, 76), (808, 96), (490, 96), (490, 118))


def _packed_sequence(picture: Drawing) -> None:
    """Draw the bar: clip 8 x B/8 images, of which the first two feed ssl and the first one rec."""
    unit = 920 / (257 + 128.5 + 74)
    widths = (257 * unit, 128.5 * unit, 74 * unit)
    x, y, height = 20.0, 146.0, 56.0
    picture.text(LEFT, 132, "packed batch: one token sequence, no padding inside", is_bold=True, anchor="start")
    picture.box(x, y, widths[0], height, "clip")
    eighth = widths[0] / 8
    picture.box(x, y, eighth, height, "rec")
    for number in range(1, 8):
        edge = x + number * eighth
        stroke = picture.palette["clip"][1]
        picture.parts.append(
            f'<path d="M{edge:g} {y:g} V{y + height:g}" stroke="{stroke}" stroke-width="1" stroke-opacity="0.35"/>'
        )
    picture.text(x + widths[0] * 0.56, y + 18, "clip: all B images", is_bold=True)
    picture.text(x + widths[0] * 0.56, y + 38, "257 tokens each", is_muted=True)
    picture.text(x + eighth / 2, y + 18, "rec", is_bold=True)
    picture.text(x + eighth / 2, y + 38, "B/8", is_muted=True)
    second = x + widths[0] + 10
    picture.box(second, y, widths[1], height, "ssl", "ssl, global crops", "2 x B/4, masked")
    picture.box(second + widths[1] + 10, y, widths[2], height, "ssl", "local crops", "8 x B/4")
    _brace(picture, x, eighth, y + height + 8, "rec", "rec reads clip's own features: no pass of its own")
    _brace(picture, x, 2 * eighth, y + height + 26, "ssl", "ssl crops are taken from the first B/4 images")
    for center in (x + widths[0] * 0.88, second + widths[1] / 2, second + widths[1] + 10 + widths[2] / 2):
        picture.arrow((center, y + height + 4), (center, 288))


def _brace(picture: Drawing, x: float, width: float, y: float, role: str, line: str) -> None:
    stroke = picture.palette[role][1]
    picture.parts.append(
        f'<path d="M{x:g} {y - 4:g} V{y + 4:g} H{x + width:g} V{y - 4:g}" fill="none" stroke="{stroke}" '
        'stroke-width="1.8"/>'
    )
    picture.text(x + width + 8, y + 3, line, is_muted=True, anchor="start")


def _branches(picture: Drawing) -> None:
    top, height = 384, 60
    boxes = {
        "clip": (("image head", "CLS -> 768"), ("text tower", "captions, packed")),
        "ssl": (("prototype head", "CLS, masked patches"), ("EMA teacher", "global crops, whole")),
        "rec": (("bottleneck", "64 channels"), ("decoder", "latent -> pixels")),
    }
    for name, (x, width) in COLUMNS.items():
        half = width / 2 - 10
        first, second = boxes[name]
        picture.box(x, top, half, height, name, *first)
        picture.box(x + half + 20, top, half, height, name, *second, dashed=second[0] == "EMA teacher")
        picture.arrow((x + half / 2, 340), (x + half / 2, top - 4), role=name)
        if name != "rec":
            picture.arrow((x + half / 2, top + height), (x + half / 2, 486), role=name)
        picture.arrow((x + half + 20 + half / 2, top + height), (x + half + 20 + half / 2, 486), role=name)
        if name == "rec":
            picture.arrow((x + half, top + height / 2), (x + half + 17, top + height / 2), role=name)
    x, width = COLUMNS["ssl"]
    middle = x + width * 0.75 + 5
    picture.arrow((middle, 340), (middle, top - 4), role="ssl", dashed=True)
    picture.text(middle + 8, 361, "EMA of weights", is_muted=True, anchor="start")


def _losses(picture: Drawing) -> None:
    lines = {
        "clip": ("clip loss", "image-text contrast over all ranks"),
        "ssl": ("ssl loss", "self-distillation + masked patches"),
        "rec": ("rec loss", "L1 + LPIPS"),
    }
    for name, (x, width) in COLUMNS.items():
        picture.box(x, 490, width, 56, name, *lines[name])
        picture.arrow((x + width / 2, 546), (x + width / 2, 586), role=name)
    picture.box(
        LEFT,
        590,
        940,
        74,
        "plain",
        "total = clip + ssl + 0.1 rec  ->  one backward pass  ->  DeepSpeed ZeRO-1, 2 or 3",
        "gradients, AdamW moments, fp32 weights and fp32 EMA live as shards",
        "checkpoint: named ranges in safetensors, loaded at any world size and ZeRO stage",
    )


def main() -> None:
    """Write both files."""
    for name, palette in PALETTES.items():
        Path(__file__).with_name(f"architecture-{name}.svg").write_text(draw(palette))


if __name__ == "__main__":
    main()
