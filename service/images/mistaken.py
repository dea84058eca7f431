"""Recognises other kinds of data sent in place of an image, by their first bytes, and names the remedy."""

# Brands of ISO base media files (byte 8 on): phone photographs, web images, video.
BRANDS = {
    b"heic": "a HEIC photograph, as iPhones take: send it as JPEG (on the phone: Settings, Camera, Formats, Most "
    "Compatible)",
    b"avif": "an AVIF image: save it as PNG or JPEG",
}
BRANDS |= dict.fromkeys((b"heix", b"heim", b"heis", b"mif1", b"msf1", b"hevc"), BRANDS[b"heic"])
BRANDS[b"avis"] = BRANDS[b"avif"]

BEGINNINGS = {
    b"%PDF": "a PDF document: send its pages as PNG or JPEG",
    b"II*\x00": "a TIFF image, or a camera's raw file: save it as PNG or JPEG",
    b"MM\x00*": "a TIFF image, or a camera's raw file: save it as PNG or JPEG",
    b"\x00\x00\x00\x0cjP  ": "a JPEG 2000 image: save it as PNG or JPEG",
    b"\xff\x0a": "a JPEG XL image: save it as PNG or JPEG",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL image: save it as PNG or JPEG",
    b"\x00\x00\x01\x00": "an icon (ICO): save it as PNG",
    b"8BPS": "a Photoshop document: export it as PNG or JPEG",
    b"PK\x03\x04": "a ZIP archive or an office document: send the images in it one by one",
    b"\x1f\x8b": "gzip: send it uncompressed, without Content-Encoding",
    b"data:image/": "a data: URL: decode its base64 part and send the bytes",
    b"/9j/": "base64 text: decode it and send the bytes",
    b"iVBORw0KGgo": "base64 text: decode it and send the bytes",
    b"version https://git-lfs": "a Git LFS pointer: `git lfs pull` fetches the image",
}
# Text, compared in lower case and without leading white space.
TEXTS = {
    b"<svg": "an SVG drawing: save it as PNG",
    b"<?xml": "an XML file, perhaps an SVG drawing: save it as PNG",
    b"<!doctype html": "a web page, perhaps an error page in place of a download",
    b"<html": "a web page, perhaps an error page in place of a download",
    b"{": "JSON: send the image's bytes as the body, or as the field `image` of a form",
    b"--": "a form without its Content-Type: let the client write it (multipart/form-data; boundary=...)",
}


def name_of(body: bytes) -> str | None:
    """Return what `body` seems to be, and the remedy; None if unknown."""
    if body[4:8] == b"ftyp":
        return BRANDS.get(body[8:12], "video or audio (MP4 or similar): send a still image")
    for beginning, name in BEGINNINGS.items():
        if body.startswith(beginning):
            return name
    text = body[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((name for beginning, name in TEXTS.items() if text.startswith(beginning)), None)
