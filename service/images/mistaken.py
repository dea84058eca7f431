"""What people send in place of an image, told from its first bytes, and what to do instead."""

# As ISO media files name themselves from their fifth byte on: photographs of phones, pictures of the web, and films.
BRANDS = {
    b"heic": "a HEIC photograph, as iPhones make them: send it as JPEG (on the phone: Settings, Camera, Formats, Most "
    "Compatible)",
    b"avif": "an AVIF picture: save it as PNG or JPEG",
}
BRANDS |= dict.fromkeys((b"heix", b"heim", b"heis", b"mif1", b"msf1", b"hevc"), BRANDS[b"heic"])
BRANDS[b"avis"] = BRANDS[b"avif"]

BEGINNINGS = {
    b"%PDF": "a PDF document: send its pages as PNG or JPEG",
    b"II*\x00": "a TIFF picture, or a camera's raw file: save it as PNG or JPEG",
    b"MM\x00*": "a TIFF picture, or a camera's raw file: save it as PNG or JPEG",
    b"\x00\x00\x00\x0cjP  ": "a JPEG 2000 picture: save it as PNG or JPEG",
    b"\xff\x0a": "a JPEG XL picture: save it as PNG or JPEG",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL picture: save it as PNG or JPEG",
    b"\x00\x00\x01\x00": "an icon (ICO): save it as PNG",
    b"8BPS": "a Photoshop document: export it as PNG or JPEG",
    b"PK\x03\x04": "a ZIP archive or an office document: send the pictures in it one by one",
    b"\x1f\x8b": "gzip: send it unpacked, without Content-Encoding",
    b"data:image/": "a data: URL: send the bytes that its base64 part stands for",
    b"/9j/": "base64 text: send the bytes that it stands for",
    b"iVBORw0KGgo": "base64 text: send the bytes that it stands for",
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` fetches the picture",
}
# Text, which may begin with blanks and be written in capitals.
TEXTS = {
    b"<svg": "an SVG drawing: save it as PNG",
    b"<?xml": "an XML file, perhaps an SVG drawing: save it as PNG",
    b"<!doctype html": "a web page, perhaps of an error where a picture was to be fetched",
    b"<html": "a web page, perhaps of an error where a picture was to be fetched",
    b"{": "JSON: send the picture's bytes themselves as the body, or as the field `image` of a form",
    b"--": "a form without its Content-Type: let the client write it (multipart/form-data; boundary=...)",
}


def name_of(body: bytes) -> str | None:
    """What `body` seems to be and what to do about it; None where nobody can tell."""
    if body[4:8] == b"ftyp":
        return BRANDS.get(body[8:12], "a film or a sound (MP4 or alike): send one still frame of it")
    for beginning, name in BEGINNINGS.items():
        if body.startswith(beginning):
            return name
    text = body[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((name for beginning, name in TEXTS.items() if text.startswith(beginning)), None)
