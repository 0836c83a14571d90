from pixeldecoder import PixelDecoderPipeline  # noqa: F401
