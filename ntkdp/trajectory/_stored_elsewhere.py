"""Whether a file in HDF5, as netCDF files are, has all its data itself."""

from pathlib import Path


def stored_elsewhere(path: Path) -> str | None:
    """The first part of a file whose data would be read from other files; None if there is none.

    External links, virtual data sets and external storage name other files, any that the reader may
    read. Links within the file are named too: netCDF has none.

    Raises
    ------
    OSError, KeyError, RuntimeError
        If it is no such file, or damaged.
    """
    import h5py

    with h5py.File(path, "r") as file:
        dict(file.attrs)
        groups, known = [file], set()
        while groups:
            group = groups.pop()
            for name in group:
                where = f"{group.name.rstrip('/')}/{name}"
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    return f"{where} is a link"
                part = group[name]
                if isinstance(part, h5py.Dataset) and part.is_virtual:
                    return f"{where} is a virtual data set"
                if isinstance(part, h5py.Dataset) and part.external:
                    return f"{where} has external storage"
                if isinstance(part, h5py.Group):
                    # A group may be within itself.
                    place = h5py.h5o.get_info(part.id).addr
                    if place not in known:
                        known.add(place)
                        groups.append(part)
    return None
