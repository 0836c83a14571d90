"""ComfyUI's nodes for pixeldecoder: this folder, or a link to it, goes into ComfyUI's `custom_nodes`."""

try:
    import comfy_api  # noqa: F401
except ImportError:  # tests read `logic` without ComfyUI
    pass
else:
    from .nodes import comfy_entrypoint  # noqa: F401
