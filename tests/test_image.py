"""Reading and writing images, and the size rule shared with videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from kling.data import transforms
from kling.data.image import read_image, read_mask, write_png
from kling.data.transforms import contain, fit, to_tensor, to_uint8
from kling.data.video import write_gif
from kling.errors import UserError
from tests.test_video import H, W, make, smooth

# -------------------------------------------------------------------------------------------------------------------- images


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn clockwise
    Image.fromarray(smooth(1)[0].numpy()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    want = np.rot90(smooth(1)[0].numpy(), -1).astype(float)
    assert np.abs(read_image(tmp_path / "a.jpg").numpy() - want).mean() < 2


def icc(space: str, curve: bytes, primaries: tuple = ()) -> bytes:
    """A version 4 profile of a display: tone curves and, for RGB, the primaries in XYZ (D50)."""

    def xyz(x: float, y: float, z: float) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in (x, y, z))

    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249)}
    names = (b"rTRC", b"gTRC", b"bTRC") if primaries else (b"kTRC",)
    tags |= {name: curve for name in names} | {name: xyz(*at) for name, at in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=False)}
    start, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, body in tags.items():
        table += name + (start + len(data)).to_bytes(4, "big") + len(body).to_bytes(4, "big")
        data += body
    head = bytes(4) + b"\x04\x20\0\0mntr" + space.encode().ljust(4) + b"XYZ " + bytes(12) + b"acsp" + bytes(28)  # without its size
    head += xyz(0.9642, 1.0, 0.8249)[8:] + bytes(48)
    whole = head + len(tags).to_bytes(4, "big") + table + data
    return (4 + len(whole)).to_bytes(4, "big") + whole


SRGB_CURVE = b"para" + bytes(4) + b"\0\3\0\0" + b"".join(
    round(value * 65536).to_bytes(4, "big") for value in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
)  # fmt: skip
LINEAR = b"curv" + bytes(8)
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def test_an_embedded_colour_profile_is_applied(tmp_path):
    """A phone's green in Display P3 is outside sRGB: red is clipped at 0."""
    display_p3, linear_grey = icc("RGB", SRGB_CURVE, P3), icc("GRAY", LINEAR)
    green = np.full((H, W, 3), (60, 200, 90), np.uint8)
    saved = {"a.png": Image.fromarray(green), "a.tiff": Image.fromarray(green), "p.png": Image.fromarray(green).quantize(4)}
    saved["alpha.png"] = Image.fromarray(np.dstack([green, np.full((H, W), 255, np.uint8)]))
    for name, image in saved.items():
        image.save(tmp_path / name, icc_profile=display_p3)
        assert np.abs(read_image(tmp_path / name)[0, 0].numpy().astype(int) - (0, 205, 72)).max() <= 2, name
    Image.fromarray(green).save(tmp_path / "a.jpg", icc_profile=display_p3, quality=98)
    assert np.abs(read_image(tmp_path / "a.jpg")[0, 0].numpy().astype(int) - (0, 205, 72)).max() <= 5
    Image.fromarray(green[..., 0]).save(tmp_path / "grey.png", icc_profile=linear_grey)
    want = 255 * (1.055 * (60 / 255) ** (1 / 2.4) - 0.055)
    assert np.abs(read_image(tmp_path / "grey.png")[0, 0].numpy() - want).max() <= 2
    half = np.dstack([green, np.zeros((H, W), np.uint8)])
    Image.fromarray(half).save(tmp_path / "clear.png", icc_profile=display_p3)
    assert read_image(tmp_path / "clear.png").eq(255).all()
    for profile in (None, b"no profile", display_p3[:200]):  # none, or a damaged one: as in browsers, the numbers are sRGB's
        Image.fromarray(green).save(tmp_path / "plain.png", icc_profile=profile)
        assert read_image(tmp_path / "plain.png")[0, 0].tolist() == [60, 200, 90]


def test_every_mode(tmp_path):
    grey = np.linspace(0, 255, W, dtype=np.uint8)[None].repeat(H, 0)
    plain = torch.from_numpy(grey)[..., None].expand(H, W, 3).float()
    picture, deep = Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 257)
    saved = {
        "l.png": picture,
        "p.png": picture.convert("P"),
        "rgb.webp": picture.convert("RGB"),
        "cmyk.jpg": picture.convert("RGB").convert("CMYK"),
    }
    saved |= {"1.bmp": picture.convert("1"), "16.png": deep, "16.tiff": deep, "la.png": picture.convert("LA")}
    for name, image in saved.items():
        image.save(tmp_path / name)
        got = read_image(tmp_path / name)
        assert got.dtype == torch.uint8 and got.shape == (H, W, 3)
        assert abs(got.float().mean() - plain.mean()) < 3
        if not name.startswith("1."):
            assert (got.float() - plain).abs().max() < 20, name


def test_transparency_is_white(tmp_path):
    pixels = np.zeros((H, W, 4), np.uint8)
    pixels[:, : W // 2] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png")
    assert got[0, 0].tolist() == [255, 0, 0] and got[0, -1].tolist() == [255, 255, 255]
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True)
    assert torch.equal(got, read_image(tmp_path / "a.webp"))


def test_bad_images(tmp_path):
    write_png(tmp_path / "a.png", torch.randint(256, (H, W, 3)).byte())
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    (tmp_path / "text.png").write_text("words")
    (tmp_path / "empty.png").touch()
    make(tmp_path / "a.mp4", n=2).rename(tmp_path / "video.png")
    write_gif(tmp_path / "moving.png", smooth(3), 8)
    for name, says in {
        "half": "damaged",
        "text": "text",
        "empty": "empty",
        "video": "as a video",
        "moving": "animation",
        "no": "not exist",
    }.items():
        with pytest.raises(UserError, match=says) as error:
            read_image(tmp_path / f"{name}.png")
        assert f"{name}.png" in str(error.value)


def test_mask_is_aligned_with_its_picture(tmp_path):
    mask = np.zeros((96, 200), np.uint8)
    mask[:, 100:] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    got = read_mask(tmp_path / "m.png", 48, 64)
    assert got.dtype == torch.float32 and got.shape == (48, 64) and got[:, :32].max() == 0 and got[:, 32:].min() == 1
    assert torch.equal(got, fit(np.repeat(mask[..., None], 3, 2), 48, 64)[..., 0].float() / 255)


# ---------------------------------------------------------------------------------------------------------------- transforms


def test_tensor_round_trip():
    frames = torch.arange(256, dtype=torch.uint8).reshape(4, 8, 8, 1).repeat(1, 1, 1, 3)
    video = to_tensor(frames)
    assert video.shape == (3, 4, 8, 8) and video.min() == -1 and video.max() == 1
    assert torch.equal(to_uint8(video), frames) and torch.equal(to_tensor(frames.numpy()), video)
    assert to_uint8(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).repeat(3, 1, 1, 1))[0, 0, :, 0].tolist() == [0, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.full((3, 1, 2, 2), float("nan")))


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (100, 60), (7, 300)])
def test_image_and_video_are_fitted_equally(size):
    frames = smooth(3)
    for mode in ("cover", "contain"):
        fitted = fit(frames, *size, mode)
        assert fitted.shape == (3, *size, 3) and all(torch.equal(fit(f, *size, mode), g) for f, g in zip(frames, fitted, strict=True))
    assert torch.equal(fit(frames, H, W), frames)


def test_cover_crops_the_centre_and_contain_shows_all():
    wide = torch.zeros(1, 20, 60, 3, dtype=torch.uint8)
    wide[:, :, 20:40] = 200
    assert fit(wide, 10, 10).min() > 150  # the middle third alone
    shown = fit(wide, 60, 60, "contain")
    assert shown[:, :20].max() == 0 == shown[:, 40:].max() and torch.equal(shown[:, 20:40], wide)
    placed, mask = contain(wide + 7, 60, 60)
    assert mask[:20].min() == 1 == mask[40:].min() and mask[20:40].max() == 0 and placed[:, 0, 0].eq(7).all()


@pytest.mark.parametrize("shape", [(1, 2_000_000), (2_000_000, 1), (3, 500_000)])
def test_a_picture_far_longer_than_the_frame_takes_no_more_memory_than_its_middle(shape, monkeypatch):
    """A line of pixels, scaled as a whole until it fills the frame, would take terabytes."""
    sizes, resize = [], transforms.cv2.resize
    monkeypatch.setattr(transforms.cv2, "resize", lambda picture, size, **how: sizes.append(size) or resize(picture, size, **how))
    picture = np.zeros((*shape, 3), np.uint8)
    picture[..., 1] = 200
    fitted = fit(picture, 64, 112)
    assert fitted.shape == (64, 112, 3) and fitted[..., 1].unique().tolist() == [200] and max(w * h for w, h in sizes) < 10**6
    assert np.allclose(fit(np.ones(shape, np.float32), 64, 112), 1)


@pytest.mark.parametrize("shape", [(8, 400), (400, 8)])
def test_the_middle_alone_gives_the_same_picture(shape, monkeypatch):
    """As scaling all of it and cropping, up to the pixel by which the middle of an odd number is off."""
    ramp = np.linspace(0, 255, max(shape))
    ramp = np.broadcast_to(ramp if shape[1] > shape[0] else ramp[:, None], shape)
    picture = np.stack([ramp] * 3, -1).astype(np.uint8)
    whole = fit(picture, 64, 112).float()
    monkeypatch.setattr(transforms, "MOST", 1)
    assert (fit(picture, 64, 112).float() - whole).abs().mean() < 2


def test_shrinking_does_not_alias():
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert (fit(stripes, 16, 16).float() - 127.5).abs().max() <= 1


def test_sizes_and_modes_are_checked():
    for size in ((0, 8), (8, -1), (8.0, 8), (True, 8)):
        with pytest.raises(UserError, match="whole number"):
            fit(smooth(1), *size)
    with pytest.raises(UserError, match="cover"):
        fit(smooth(1), 8, 8, "covr")
