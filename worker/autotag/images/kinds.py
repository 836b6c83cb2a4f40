"""Detects the kind of a file by its content, never by its name."""

from __future__ import annotations

import re
import zlib

from autotag.errors import image_error
from autotag.images.opened import unsupported

#: The kinds that can be tagged, by their first bytes.
READ = (
    (b"\xff\xd8", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF87a", "GIF"), (b"GIF89a", "GIF"),
    (b"BM", "BMP"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
    (b"\0\0\1\0", "ICO"), (b"\0\0\2\0", "ICO"), (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"%PDF-", "PDF"),
    (b"FUJIFILMCCD-RAW", "RAW"), (b"IIRO\x08\0", "RAW"), (b"IIRS\x08\0", "RAW"), (b"MMOR\0\x08", "RAW"),
    (b"IIU\0", "RAW"), (b"FOVb", "RAW"),
)  # fmt: skip
#: Brands of ISO media files that are pictures.
BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"), **dict.fromkeys((b"mif1", b"msf1", b"mif2", b"miaf"), "HEIF"),
    b"crx ": "RAW",
}  # fmt: skip
#: Names of the other kinds, by the bytes at a position.
NAMED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"8BPS", "a Photoshop file (PSD)"), (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"), (0, b"II\xbc", "a JPEG XR image"),
    (0, b"gimp xcf", "a GIMP file (XCF)"), (0, b"DDS ", "a texture (DDS)"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (0, b"#?RADIANCE", "a Radiance image (HDR)"), (0, b"#?RGBE", "a Radiance image (HDR)"),
    (0, b"qoif", "a QOI image"), (0, b"FLIF", "a FLIF image"), (0, b"BPG\xfb", "a BPG image"),
    (0, b"AT&TFORM", "a DjVu document"), (0, b"icns", "a macOS icon (ICNS)"), (128, b"DICM", "a medical image (DICOM)"),
    (0, b"SIMPLE  =", "an astronomical image (FITS)"), (0, b"\x8aMNG", "an MNG animation"),
    (0, b"\x8bJNG", "a JNG image"), (0, b"\xd7\xcd\xc6\x9a", "a Windows drawing (WMF)"),
    (40, b" EMF", "a Windows drawing (EMF)"), (0, b"\x59\xa6\x6a\x95", "a Sun raster image"),
    (0, b"\x01\xda\0", "an SGI image"), (0, b"\x01\xda\1", "an SGI image"), (0, b"/* XPM */", "an XPM image"),
    (0, b"\0\0\2\0\0\0", "a Targa image (TGA)"), (0, b"\0\0\x0a\0\0\0", "a Targa image (TGA)"),
    (0, b"SDPX", "a DPX image"), (0, b"XPDS", "a DPX image"), (0, b"id=ImageMagick", "an ImageMagick file (MIFF)"),
    (0, b"PF\n", "a Netpbm image (PFM)"), (0, b"\x0a\x05\x01", "a PCX image"), (0, b"\xabKTX", "a texture (KTX)"),
    (0, b"%!PS-Adobe", "an EPS or PostScript drawing"), (0, b"%!", "an EPS or PostScript drawing"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS drawing"), (0, b"\x06\x06\xed\xf5", "an InDesign document"),
    (0, b"\0\xffKA", "an Affinity document"), (8, b"CDR", "a CorelDRAW drawing"), (0, b"AC10", "a CAD drawing (DWG)"),
    (0, b"BLENDER", "a 3D model (Blender)"), (0, b"glTF", "a 3D model (glTF)"), (0, b"Kaydara FBX", "a 3D model (FBX)"),
    (0, b"solid ", "a 3D model (STL)"), (0, b"ply\n", "a 3D model (PLY)"),
    (0, b"MM\0\x06\x15", "a QuarkXPress document"),
    (0, b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"), (8, b"AVI ", "a video (AVI)"), (0, b"FLV\1", "a video (FLV)"),
    (0, b"\0\0\1\xba", "a video (MPEG)"), (0, b"\0\0\1\xb3", "a video (MPEG)"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video or sound (Windows Media)"), (0, b".RMF", "a video (RealMedia)"),
    (4, b"moov", "a video (QuickTime)"), (4, b"mdat", "a video (QuickTime)"), (4, b"wide", "a video (QuickTime)"),
    (4, b"pnot", "a video (QuickTime)"), (4, b"free", "a video (QuickTime)"), (4, b"skip", "a video (QuickTime)"),
    (0, b"OggS", "a sound or video (Ogg)"), (8, b"WAVE", "a sound (WAV)"), (0, b"ID3", "a sound (MP3)"),
    (0, b"fLaC", "a sound (FLAC)"), (0, b"MThd", "a sound (MIDI)"), (8, b"AIFF", "a sound (AIFF)"),
    (8, b"AIFC", "a sound (AIFF)"), (0, b"#!AMR", "a sound (AMR)"), (0, b"caff", "a sound (CAF)"),
    (0, b"\xff\xfb", "a sound (MP3)"), (0, b"\xff\xf3", "a sound (MP3)"), (0, b"\xff\xf2", "a sound (MP3)"),
    (0, b"\xff\xf1", "a sound (AAC)"), (0, b"\xff\xf9", "a sound (AAC)"), (8, b"ILBM", "an Amiga image (IFF)"),
    (8, b"ACON", "an animated cursor (ANI)"), (0, b"CWS", "a Flash animation"), (0, b"FWS", "a Flash animation"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document"), (0, b"{\\rtf", "a text document (RTF)"),
    (0, b"Rar!\x1a\x07", "an archive (RAR)"), (0, b"7z\xbc\xaf\x27\x1c", "an archive (7-Zip)"),
    (0, b"\xfd7zXZ\0", "an archive (XZ)"), (0, b"BZh", "an archive (BZip2)"),
    (0, b"\x28\xb5\x2f\xfd", "an archive (Zstandard)"),
    (257, b"ustar", "an archive (TAR)"), (0, b"MSCF", "an archive (CAB)"), (0, b"!<arch>", "an archive (AR)"),
    (0, b"xar!", "an archive (XAR)"), (0, b"OTTO", "a font (OpenType)"), (0, b"\0\1\0\0\0", "a font (TrueType)"),
    (0, b"true\0", "a font (TrueType)"), (0, b"ttcf", "a font (TrueType)"), (0, b"wOFF", "a font (WOFF)"),
    (0, b"wOF2", "a font (WOFF2)"), (0, b"MZ", "a Windows program"), (0, b"\x7fELF", "a Linux program"),
    (0, b"\xcf\xfa\xed\xfe", "a macOS program"), (0, b"\xca\xfe\xba\xbe", "a macOS or Java program"),
    (0, b"SQLite format 3", "a database (SQLite)"), (0, b"bplist0", "a macOS property list"),
    (0, b"\0\x05\x16\x07", "macOS's metadata of another file (AppleDouble); upload the file itself"),
    (0, b"\0\0\0\1Bud1", "a macOS folder's settings (.DS_Store)"), (0, b"\x4c\0\0\0\1\x14\x02\0", "a Windows shortcut"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file that it points to"),
    (0, b"data:image/", "the text of a data URL"), (0, b"-----BEGIN ", "a key or certificate (PEM)"),
)  # fmt: skip
#: Names of the kinds of ZIP archives, by the name of a file in them.
ZIPPED = (
    (b"word/", "a Word document"), (b"xl/", "an Excel document"), (b"ppt/", "a PowerPoint document"),
    (b"application/epub", "an e-book (EPUB)"), (b"application/x-krita", "a Krita drawing"),
    (b"application/vnd.oasis", "an OpenDocument file"), (b"image/openraster", "an OpenRaster drawing"),
    (b"Document.archive", "a Procreate drawing"), (b"AndroidManifest.xml", "an Android app"),
    (b".usdc", "a 3D model (USDZ)"),
    (b"pages/", "a Sketch drawing"), (b"META-INF/", "a Java archive"), (b"Index/Document.iwa", "an iWork document"),
)  # fmt: skip
VIDEO_BRANDS = {b"qt  ": "QuickTime", b"M4V": "M4V", b"3g": "3GP", b"f4v": "F4V", b"mjp2": "Motion JPEG 2000"}
#: The allowed prolog of an SVG, and its first element.
_PROLOGUE = re.compile(rb"\s*(<\?[^>]*>|<!--.*?-->|<!DOCTYPE\s+svg\b[^\[>]*(\[.*?\]\s*)?>)", re.DOTALL)
_SVG = re.compile(rb"\s*<(\w+:)?svg[\s>/]")
MAX_PROLOGUE = 1_000_000  # bytes
BMP_HEADERS = {12, 16, 40, 52, 56, 64, 108, 124}  # their lengths
HEAD = 4096  # bytes that are looked at


def kind_of(data: bytes) -> str:
    """The kind of a file that can be tagged: JPEG, PNG, WebP, HEIC, PDF, … (`READ` and more).

    Raises:
        TaggingError: ``empty_file``, ``unsupported_format`` (with the kind's name) or ``not_an_image``.
    """
    head = bytes(data[:HEAD])
    if not head:
        raise image_error("empty_file", "The file is empty.")
    for start, kind in READ:
        if head.startswith(start) and _is_plausible(kind, head):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        return _media(head)
    if _is_svg(data):
        return "SVG"
    if b"%PDF-" in head[:1024]:  # some programs write other bytes before it
        return "PDF"
    what = _named(head) or _packed(head, bytes(data[-HEAD:])) or _text(head)
    if what:
        raise unsupported(what)
    raise image_error("not_an_image", "The file is not an image.")


def _is_plausible(kind: str, head: bytes) -> bool:
    """Whether the bytes after a short signature are valid: a text may begin with BM, and a Targa image like a
    cursor."""
    if kind == "BMP":
        return int.from_bytes(head[14:18], "little") in BMP_HEADERS
    return kind != "ICO" or head[4:6] != b"\0\0"


def _is_svg(data: bytes) -> bool:
    text = without_utf16(data[:MAX_PROLOGUE]).removeprefix(b"\xef\xbb\xbf")
    at = 0
    while text[at : at + 200].lstrip().startswith(b"<") and (part := _PROLOGUE.match(text, at)):
        at = part.end()
    return _SVG.match(text, at) is not None


def without_utf16(text: bytes) -> bytes:
    """The text in UTF-8 if its byte order mark says that it is in UTF-16."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")):
        return text[: len(text) // 2 * 2].decode("utf-16", "replace").encode("utf-8", "replace")
    return text


def _media(head: bytes) -> str:
    size = min(max(int.from_bytes(head[:4]), 16), 512)
    major, compatible = head[8:12], [head[at : at + 4] for at in range(16, size, 4)]
    for brand in (major, *compatible):
        if brand == b"jxl ":
            raise unsupported("a JPEG XL image")
        if brand in (b"jp2 ", b"jpx ", b"jpm "):
            return "JPEG 2000"
        if brand in BRANDS and BRANDS[brand] != "HEIF":
            return BRANDS[brand]
    if major in BRANDS:
        return BRANDS[major]
    if major in (b"M4A ", b"M4B ", b"F4A "):
        raise unsupported("a sound (M4A)")
    raise unsupported(f"a video ({next((n for start, n in VIDEO_BRANDS.items() if major.startswith(start)), 'MP4')})")


def _named(head: bytes) -> str | None:
    for at, signature, name in NAMED:
        if head.startswith(signature, at):
            return name
    if head[0] == 0x47 and head[188:189] == b"\x47" == head[376:377]:
        return "a video (MPEG transport stream)"
    if re.match(rb"P[1-7]\s", head):
        return "a Netpbm image (PNM)"
    return None


def _packed(head: bytes, tail: bytes) -> str | None:
    if head.startswith(b"\x1f\x8b"):
        try:
            # at most HEAD bytes, however large the file would become
            inside = zlib.decompressobj(47).decompress(head, HEAD)
        except zlib.error:
            inside = b""
        return "a compressed SVG drawing (SVGZ)" if b"<svg" in inside else "an archive (GZip)"
    if head.startswith((b"PK\3\4", b"PK\5\6", b"PK\7\x08")):
        return next((name for inside, name in ZIPPED if inside in head or inside in tail), "an archive (ZIP)")
    return None


def _text(head: bytes) -> str | None:
    """The kind of a text file; None if it is not a text."""
    head = without_utf16(head)
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head):
        return None
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if re.match(rb"<!doctype html|<html|<head|<body|<script|<div|<p>", text) or b"<html" in text:
        return "a web page (HTML), perhaps an error page"
    if text.startswith(b"<?xml") or re.match(rb"<[a-z!]", text):
        return "an XML document"
    if text.startswith((b"{", b"[")):
        return "a JSON document"
    return "a text, not an image" if text and _is_mostly_text(head) else None


def _is_mostly_text(head: bytes) -> bool:
    try:
        head[:-4].decode() if len(head) == HEAD else head.decode()
    except UnicodeDecodeError:
        return False
    return True
