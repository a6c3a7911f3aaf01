"""A picture for a character that has none: its initials on a colour of its own, as PNG (DESIGN section 5)."""

import hashlib
import io
import unicodedata

from ..errors import FlywheelError

WIDTH, HEIGHT = 400, 600


def initials(name: str) -> str:
    """One or two capital letters A to Z for a name; empty where its script has none."""
    plain = unicodedata.normalize("NFKD", name)
    words = ["".join(c for c in word if c.isascii() and c.isalpha()) for word in plain.split()]
    letters = [word[0].upper() for word in words if word]
    return "".join(letters[:1] + letters[1:][-1:])


def initials_picture(name: str, seed: str) -> bytes:
    """A PNG of 400 x 600 pixels; the same name and seed give the same colours.

    A name without Latin letters gets a silhouette. Raises FlywheelError where Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415
    except ImportError:
        raise FlywheelError("drawing a picture needs pillow: pip install pillow, or give a picture.") from None
    hue = hashlib.sha256(seed.encode()).digest()[0] * 360 // 256
    image = Image.new("RGB", (WIDTH, HEIGHT), f"hsl({hue}, 45%, 38%)")
    draw = ImageDraw.Draw(image)
    light = f"hsl({hue}, 60%, 88%)"
    if letters := initials(name):
        draw.text((WIDTH / 2, HEIGHT / 2), letters, fill=light, font=ImageFont.load_default(180), anchor="mm")
    else:
        draw.circle((WIDTH / 2, 230), 90, fill=light)
        draw.ellipse((60, 350, WIDTH - 60, HEIGHT + 150), fill=light)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
