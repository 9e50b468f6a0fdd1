"""Operations on a model: choose neurons, prune, recover, search for widths, meet a quality target."""
