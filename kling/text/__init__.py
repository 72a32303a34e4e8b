"""Text encoders."""

from kling.text.encoder import ByteTextEncoder

__all__ = ["ByteTextEncoder"]
