"""Calls libvips, which decodes and scales large pictures strip by strip, in little memory.

pyvips has no wheel, and the image installs no source packages (deploy/Dockerfile). But its wheel of libvips,
`pyvips-binary`, contains the compiled binding, which this module calls.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

#: Band formats of libvips, in the order of its enum ``VipsBandFormat``.
FORMATS = ("uchar", "char", "ushort", "short", "uint", "int", "float", "complex", "double", "dpcomplex")
#: Messages of libvips and libtiff when they run out of memory. Without this check, the file would count as damaged.
NO_MEMORY = ("out of memory", "allocate memory", "No space for")
Option = int | float | bool | str


class VipsError(Exception):
    """libvips cannot do it: the file is damaged or has a form that it does not support."""


@dataclass(frozen=True)
class Image:
    """A picture whose pixels are computed when they are read.

    Attributes:
        pointer: libvips's object.
        keep: an object that must live as long as the picture (the file's bytes).
    """

    pointer: Any
    keep: tuple[Any, ...]

    @property
    def width(self) -> int:
        return self._number("width")

    @property
    def height(self) -> int:
        return self._number("height")

    @property
    def bands(self) -> int:
        return self._number("bands")

    @property
    def format(self) -> str:
        """uchar, ushort, float, …"""
        return FORMATS[self._number("format")]

    @property
    def interpretation(self) -> str:
        """srgb, b-w, cmyk, lab, …"""
        ffi, lib = _library()
        kind = lib.vips_interpretation_get_type()
        return bytes(ffi.string(lib.vips_enum_nick(kind, self._number("interpretation")))).decode()

    def __call__(self, operation: str, **arguments: Any) -> Image:
        """Applies an operation that has this picture as its first argument."""
        name = {"subsample": "input", "extract_area": "input", "ifthenelse": "cond"}.get(operation, "in")
        return call(operation, **{name: self, **arguments})

    def pixels(self) -> bytes:
        """All pixels, row by row."""
        ffi, lib = _library()
        size = ffi.new("size_t *")
        memory = lib.vips_image_write_to_memory(self.pointer, size)
        if memory == ffi.NULL:
            raise _error()
        try:
            return bytes(ffi.buffer(memory, size[0]))
        finally:
            lib.g_free(memory)

    def _number(self, field: str) -> int:
        ffi, lib = _library()
        value = ffi.new("GValue *")
        if lib.vips_image_get(self.pointer, field.encode(), value):
            raise _error()
        try:
            fundamental = lib.g_type_fundamental(value.g_type)
            is_enum = fundamental == lib.g_type_from_name(b"GEnum")
            return int(lib.g_value_get_enum(value) if is_enum else lib.g_value_get_int(value))
        finally:
            lib.g_value_unset(value)


def load(loader: str, data: bytes, **options: Option) -> Image:
    """Opens a file with one of libvips's loaders (``png``, ``tiff``, ``webp``, ``svg``, …).

    Raises:
        VipsError: the loader does not accept the file.
    """
    ffi, lib = _library()
    memory = ffi.from_buffer(data)
    source = ffi.gc(lib.vips_source_new_from_memory(memory, len(data)), lib.g_object_unref)
    opened = call(f"{loader}load_source", source=source, access="sequential", **options)
    return Image(opened.pointer, (data, memory, source))


def from_memory(pixels: bytes, width: int, height: int, kind: str) -> Image:
    """A picture of one number per pixel (``ushort``, ``float``)."""
    ffi, lib = _library()
    memory = ffi.from_buffer(pixels)
    pointer = lib.vips_image_new_from_memory(memory, len(pixels), width, height, 1, FORMATS.index(kind))
    if pointer == ffi.NULL:
        raise _error()
    return Image(ffi.gc(pointer, lib.g_object_unref), (pixels, memory))


def call(operation: str, **arguments: Any) -> Image:
    """Calls one operation and returns its picture.

    Args:
        operation: its name in libvips.
        arguments: pictures, lists (of numbers or of pictures), libvips objects, and options as in libvips's strings.

    Raises:
        VipsError: libvips refuses it.
    """
    ffi, lib = _library()
    made = lib.vips_operation_new(operation.encode())
    if made == ffi.NULL:
        raise _error()
    keep: list[Any] = []
    options = []
    try:
        for name, value in arguments.items():
            if isinstance(value, (int, float, str)):
                options.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
            else:
                keep.append(value)
                _set(made, name, value)
        if lib.vips_object_set_from_string(ffi.cast("VipsObject *", made), ",".join(options).encode()):
            raise _error()
        built = lib.vips_cache_operation_build(made)
        if built == ffi.NULL:
            raise _error()
    except BaseException:
        lib.vips_object_unref_outputs(ffi.cast("VipsObject *", made))
        raise
    finally:
        lib.g_object_unref(made)
    result = ffi.new("GValue *")
    lib.g_value_init(result, lib.g_type_from_name(b"VipsImage"))
    lib.g_object_get_property(ffi.cast("GObject *", built), b"out", result)
    pointer = ffi.cast("VipsImage *", lib.g_value_get_object(result))
    lib.g_object_ref(pointer)
    lib.g_value_unset(result)
    lib.vips_object_unref_outputs(ffi.cast("VipsObject *", built))
    lib.g_object_unref(built)
    return Image(ffi.gc(pointer, lib.g_object_unref), tuple(keep))


def _set(operation: Any, name: str, value: Any) -> None:
    ffi, lib = _library()
    held = ffi.new("GValue *")
    if isinstance(value, Sequence) and isinstance(value[0], Image):
        lib.g_value_init(held, lib.g_type_from_name(b"VipsArrayImage"))
        lib.vips_value_set_array_image(held, len(value))
        array = lib.vips_value_get_array_image(held, ffi.NULL)
        for at, image in enumerate(value):
            lib.g_object_ref(image.pointer)
            array[at] = image.pointer
    elif isinstance(value, Sequence):
        lib.g_value_init(held, lib.g_type_from_name(b"VipsArrayDouble"))
        lib.vips_value_set_array_double(held, ffi.new("double[]", list(value)), len(value))
    else:
        is_image = isinstance(value, Image)
        lib.g_value_init(held, lib.g_type_from_name(b"VipsImage" if is_image else b"VipsSource"))
        lib.g_value_set_object(held, value.pointer if is_image else value)
    lib.g_object_set_property(ffi.cast("GObject *", operation), name.encode(), held)
    lib.g_value_unset(held)


@cache
def _library() -> tuple[Any, Any]:
    """cffi's ``ffi`` and ``lib``. libvips is initialised once; it starts no threads and keeps no results."""
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    os.environ.setdefault("VIPS_WARNING", "0")  # otherwise it writes warnings about damaged files to stderr
    from _libvips import ffi, lib

    if lib.vips_init(b"autotag"):
        raise _error(ffi, lib)
    lib.vips_cache_set_max(0)
    lib.vips_block_untrusted_set(1)  # loaders that libvips's authors do not consider safe for untrusted files,
    lib.vips_operation_block_set(b"VipsForeignLoadSvg", 0)  # except librsvg, in a process of its own (documents.py)
    return ffi, lib


def start() -> None:
    """Loads libvips, so that processes that are forked later share its memory."""
    _library()


def _error(ffi: Any = None, lib: Any = None) -> VipsError | MemoryError:
    if ffi is None:
        ffi, lib = _library()
    text = bytes(ffi.string(lib.vips_error_buffer())).decode(errors="replace").strip()
    lib.vips_error_clear()
    return MemoryError(text) if any(words in text for words in NO_MEMORY) else VipsError(text)
