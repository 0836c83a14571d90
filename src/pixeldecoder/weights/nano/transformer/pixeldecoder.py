from pixeldecoder import PixelDecoderTransformer2DModel  # noqa: F401
