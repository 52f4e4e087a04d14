"""Writers of image data sets: images with labels, texts and masks, in tables and in folders."""

from pathlib import Path

from PIL import Image

COLUMNS = {"csv": "path,label", "pairs": "image,text,label", "segmentation": "image,mask"}
"""Columns of every data set that is read from a table."""


def write_image(path, value, size=(8, 8), mode="L"):
    """Write an image of one colour, with ``value`` as its grey or red."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 255 - value, 7)).save(path)


def write_mask(path, size=(8, 8), box=(1, 1, 4, 4), value=1):
    """Write a mask with an object in a box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size)
    mask.paste(value, box)
    mask.save(path)


def write_table(root, columns, rows, files=True):
    """Write ``list.csv`` with the images and masks of its rows, unless ``files`` is False.

    Args:
        columns: a name in `COLUMNS`, or the header itself; columns behind a comma are further ones, as in "csv,site".
        rows: values by column. A row without a file, text or label has ``i.png``, ``mi.png``, ``text i`` and the label
            ``a`` or ``b``; ``value`` is the grey of the image, its number else, and ``box`` that of the object.

    Returns:
        The folder.
    """
    door, _, extra = columns.partition(",")
    header = f"{COLUMNS[door]}{',' * bool(extra)}{extra}" if door in COLUMNS else columns
    lines = [header]
    for i, given in enumerate(rows):
        name = given.get("name", f"{i}.png")
        row = {"path": name, "image": name, "mask": f"m{name}", "text": f"text {i}", "label": "ab"[i % 2], **given}
        if files:
            write_image(root / name, given.get("value", i % 256))
            if "mask" in header.split(","):
                write_mask(root / f"m{name}", box=given.get("box", (1, 1, 4, 4)))
        lines.append(",".join(str(row.get(column, "")) for column in header.split(",")))
    (Path(root) / "list.csv").write_text("\n".join(lines) + "\n")
    return root
