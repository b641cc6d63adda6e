"""The script that made `vilg/demo/assets/` and `vilg/pictures/assets/`; nobody needs to run it to use the demo.

    python -m vilg.demo.make_assets                        # fetches four Debian packages (92 MB) and builds
    python -m vilg.demo.make_assets --packages DIR         # uses *.deb files, or folders unpacked from them, in DIR

Needs Pillow, fonttools and, unless the packages are already unpacked, `apt-get` and `dpkg`. Sources (Debian 12):

- fonts-noto-color-emoji (SIL Open Font License 1.1): the pictures, the font's own 136 x 128 px bitmaps;
- unicode-cldr-core (Unicode licence): the Chinese and English names (`annotations/{zh,en}.xml`, type "tts");
- unicode-data (Unicode licence): groups, subgroups and order (`emoji/emoji-test.txt`);
- fonts-noto-cjk (SIL Open Font License 1.1): the face for captions, cut down to the characters that we draw.

What comes out:

- `glyphs_<category>.png`: sheets of 64 x 64 px RGBA cells, 16 to a row, in index order. A glyph is trimmed to its
  opaque box, fitted into 64 px with its proportions kept (Lanczos on premultiplied alpha) and centred;
- `glyphs.json`: format version, and per glyph its character, names, category, subgroup, article, sheet and cell. The
  order is part of the format: `num_glyphs: 64` means the first 64, the hand-picked `CORE`;
- `captions.otf`, in `vilg/pictures/assets/`: the subset font;
- `LICENSE.*` beside what they cover: the licence texts as the packages carry them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat

from vilg.demo.glyphs import ASSETS, CELL, FORMAT_VERSION, SHEET_COLUMNS, article_for
from vilg.demo.scenes import BACKGROUNDS, caption_characters

FONT_ASSETS = ASSETS.parents[1] / "pictures" / "assets"
PACKAGES = ("fonts-noto-color-emoji", "unicode-cldr-core", "unicode-data", "fonts-noto-cjk")

# Animals and foods by turns, chosen by eye: one picture to a word, shapes and colours that survive 24 pixels.
CORE = (
    "🐎🍌🐈🍇🐕🍉🐘🍓🦒🍍🐼🍋🦊🍒🦁🥕🐸🍅🐧🍆🦉🥦🦋🍄🐟🍞🐙🥐🐢🍔🐍🍕"
    "🐝🥚🦆🍩🐓🍪🐇🍭🐖🥑🐄🍐🐐🍑🐻🥥🐨🧅🦓🧄🐅🥔🐬🥜🦈🌰🦀🥨🐌🥞🐊🧇"
    "🦅🍣🦚🍙🦩🍡🦜🥟🦢🧁🐪🍬🦌🥧🐒🍿🦍🫐🐺🍈🦄🍊🦖🥒🐉🥓🐋🫖🦑🍯🦐🥝🐞🥮🦂🥗🦇🍟🐔🥭"
)
SUBGROUPS = {
    "animals": "animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug",
    "plants": "plant-flower plant-other",
    "food": "food-fruit food-vegetable food-prepared food-asian food-marine food-sweet drink",
    "vehicles": "transport-ground transport-water transport-air",
    "sky": "sky & weather",
    "objects": "dishware clothing sound music musical-instrument phone computer light & video book-paper money mail "
    "writing office lock tool science household sport game arts & crafts event award-medal hotel time",
}
# Weapons and vices; signs, not things; twins of another glyph; names that do not name what is shown; clock faces.
LEFT_OUT = (
    set("💣🗡⚔🔪🔫🎰💴💵💶💷🩲👙")
    | set("♠♥♦♣🃏🀄🎴🚥🚦🚏🛑🚧🔇🔈🔉🔊🔕⚡📧📨🔗📑🎭")
    | set("🔒🔓🔏🔐⌛⏳📤📥🎶🛫🛬🎞")
    | set("🍳🍜🌼🦕🦙🐛🎮🫗🌬")
    | {chr(clock) for clock in range(0x1F550, 0x1F568)}
)
MAX_ZH, MAX_EN_WORDS = 4, 2
NEAR_DUPLICATE_RMS = 18.0  # grey levels at 24 px on mid grey; below it two glyphs are told apart by luck

# Words that the report and the sheets set around the captions.
SHEET_TEXT = (
    "真实图像重建采样生成最佳选择训练测试组合见过未见记忆泛化提示文字说明描述示例标题步数损失"
    "第个张共种中英左右上下边大小颜色背景物体动植食交通工具天气正确错误对错模型输入输出问答"
    "是的在有和与一二三四五六七八九十百千万，。、；：？！（）《》“”‘’·…—–×→←↑↓≥≤≈±°✓✗"
)


def unpack_packages(packages: Path | None, work: Path) -> Path:
    """A folder with the unpacked packages: `packages` itself if they are unpacked there, else one under `work`."""
    if packages is not None and any(packages.rglob("NotoColorEmoji.ttf")):
        return packages
    if packages is None:
        packages = work / "deb"
        packages.mkdir()
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True)
    archives = sorted(packages.glob("*.deb"))
    if not archives:
        raise SystemExit(f"{packages}: neither *.deb files nor unpacked packages; expected {', '.join(PACKAGES)}")
    for archive in archives:
        subprocess.run(["dpkg", "-x", str(archive), str(work / "root")], check=True)
    return work / "root"


def find_one(root: Path, pattern: str) -> Path:
    """The first file under `root` that matches `pattern`; exits with the pattern when there is none."""
    found = sorted(root.rglob(pattern))
    if not found:
        raise SystemExit(f"{root}: no file matches {pattern}; are all of {', '.join(PACKAGES)} unpacked there?")
    return found[0]


def read_names(root: Path, language: str) -> dict[str, str]:
    """CLDR short names: character -> name."""
    tree = ElementTree.parse(find_one(root, f"annotations/{language}.xml"))
    return {node.get("cp"): node.text for node in tree.iter("annotation") if node.get("type") == "tts"}


def read_emoji(root: Path) -> dict[str, str]:
    """Single code points of emoji-test.txt in its order: character -> subgroup (U+FE0F stripped)."""
    subgroup, emoji = "", {}
    for line in find_one(root, "emoji/emoji-test.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line.split(":", 1)[1].strip()
        elif "; fully-qualified" in line:
            points = [int(point, 16) for point in line.split(";")[0].split() if point != "FE0F"]
            if len(points) == 1:
                emoji[chr(points[0])] = subgroup
    return emoji


def pick_glyphs(root: Path) -> list[dict]:
    """The glyphs to ship, core first, then emoji-test order, category by category: names short, both unique."""
    emoji, zh, en = read_emoji(root), read_names(root, "zh"), read_names(root, "en")
    category_of = {
        subgroup: category
        for category, names in SUBGROUPS.items()
        for subgroup in sorted(set(emoji.values()))
        if re.search(rf"(?:^| ){re.escape(subgroup)}(?: |$)", names)
    }
    rank = {character: index for index, character in enumerate(CORE)}
    categories = list(SUBGROUPS)
    candidates = sorted(
        (c for c in emoji if c in rank or (emoji[c] in category_of and c not in LEFT_OUT)),
        key=lambda c: (rank.get(c, len(rank)), categories.index(category_of[emoji[c]])),
    )
    picked, used = [], set()
    for character in candidates:
        names = (zh.get(character, ""), en.get(character, ""))
        short = re.fullmatch(rf"[\u4e00-\u9fff]{{1,{MAX_ZH}}}", names[0]) and names[1].isascii()
        short = short and 1 <= len(names[1].split()) <= MAX_EN_WORDS
        if character in rank and not short:
            print(f"core glyph left out, its name is too long: {character} {names}")
        if not short or used & set(names):
            continue
        used |= set(names)
        picked.append(
            {
                "char": character,
                "zh": names[0],
                "en": names[1],
                "article": article_for(names[1]),
                "category": category_of[emoji[character]],
                "subgroup": emoji[character],
                "core": character in rank,
            }
        )
    return picked


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """One glyph as a CELL x CELL RGBA picture, trimmed, fitted and centred."""
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), character, font=font, embedded_color=True)
    box = canvas.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        raise SystemExit(f"U+{ord(character):04X} renders empty")
    glyph = canvas.crop(box)
    scale = CELL / max(glyph.size)
    size = tuple(max(1, round(side * scale)) for side in glyph.size)
    glyph = glyph.resize(size, Image.Resampling.LANCZOS)  # Pillow premultiplies RGBA before it resamples
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(glyph, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def drop_near_duplicates(glyphs: list[dict], pictures: list[Image.Image]) -> list[int]:
    """Indices to keep: of two glyphs closer than NEAR_DUPLICATE_RMS at 24 px the later one goes."""
    small = []
    for picture in pictures:
        flat = Image.new("RGB", (24, 24), (128, 128, 128))
        glyph = picture.resize((24, 24), Image.Resampling.LANCZOS)
        flat.paste(glyph, mask=glyph)
        small.append(flat)
    kept: list[int] = []
    for index, image in enumerate(small):
        for other in kept:
            channels = ImageStat.Stat(ImageChops.difference(image, small[other])).rms
            rms = (sum(value**2 for value in channels) / 3) ** 0.5
            if rms < NEAR_DUPLICATE_RMS:
                print(f"dropped {glyphs[index]['en']}: {rms:.1f} from {glyphs[other]['en']}")
                break
        else:
            kept.append(index)
    return kept


def write_glyphs(root: Path, out: Path) -> list[dict]:
    """Write the sheets and `glyphs.json`; return the index entries."""
    font = ImageFont.truetype(str(find_one(root, "NotoColorEmoji.ttf")), 109)
    glyphs = pick_glyphs(root)
    pictures = [draw_glyph(font, glyph["char"]) for glyph in glyphs]
    keep = drop_near_duplicates(glyphs, pictures)
    glyphs, pictures = [glyphs[i] for i in keep], [pictures[i] for i in keep]
    sheets = {}
    for category in SUBGROUPS:
        members = [i for i, glyph in enumerate(glyphs) if glyph["category"] == category]
        rows = -(-len(members) // SHEET_COLUMNS)
        sheet = Image.new("RGBA", (SHEET_COLUMNS * CELL, rows * CELL))
        for cell, index in enumerate(members):
            sheet.paste(pictures[index], (cell % SHEET_COLUMNS * CELL, cell // SHEET_COLUMNS * CELL))
            glyphs[index]["cell"] = cell
        sheet.save(out / f"glyphs_{category}.png", optimize=True)
        sheets[category] = hashlib.sha256(sheet.tobytes()).hexdigest()
    lines = ",\n".join("    " + json.dumps(glyph, ensure_ascii=False) for glyph in glyphs)
    head = json.dumps({"format_version": FORMAT_VERSION, "cell": CELL, "pixels_sha256": sheets}, indent=2)
    (out / "glyphs.json").write_text(head[:-2] + f',\n  "glyphs": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    return glyphs


def write_font(root: Path, out: Path, glyphs: list[dict]) -> None:
    """Write `captions.otf`: Noto Sans CJK SC cut down to ASCII and to the characters of captions and sheets."""
    from fontTools import subset
    from fontTools.ttLib import TTCollection

    collection = TTCollection(str(find_one(root, "NotoSansCJK-Regular.ttc")))
    face = next(font for font in collection.fonts if font["name"].getDebugName(6) == "NotoSansCJKsc-Regular")
    names = "".join(glyph["zh"] for glyph in glyphs)
    text = "".join(map(chr, range(32, 127))) + SHEET_TEXT + names + caption_characters()
    options = subset.Options(notdef_outline=True, layout_features=["kern", "palt"], name_IDs=["*"], hinting=False)
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=text)
    subsetter.subset(face)
    face["head"].modified = face["head"].created  # else the build time makes every build differ
    face.recalcTimestamp = False
    face.save(out / "captions.otf")


def write_licences(root: Path, out: Path, packages: Iterable[str]) -> None:
    """Copy each package's licence statement beside the assets made from it."""
    for package in packages:
        shutil.copyfile(find_one(root, f"doc/{package}/copyright"), out / f"LICENSE.{package}.txt")


def main() -> None:
    """Fetch or find the packages and write every asset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, help="folder with the Debian packages, packed or unpacked")
    args = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    FONT_ASSETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        root = unpack_packages(args.packages, Path(work))
        glyphs = write_glyphs(root, ASSETS)
        write_font(root, FONT_ASSETS, glyphs)
        write_licences(root, ASSETS, PACKAGES[:3])
        write_licences(root, FONT_ASSETS, PACKAGES[3:])
    total = sum(file.stat().st_size for folder in (ASSETS, FONT_ASSETS) for file in folder.iterdir())
    print(f"{len(glyphs)} glyphs, {len(BACKGROUNDS)} backgrounds, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
