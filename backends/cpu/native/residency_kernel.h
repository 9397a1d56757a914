// The chosen experts of a layer become resident, as one call of a recorded step. Included inside the level's namespace.

static void residency(const void* arguments, const Team& team) {
    const ResidencyCall& c = *static_cast<const ResidencyCall*>(arguments);
    // the other members wait at the end of the call
    if (team.rank == 0) residency_need(c.residency, c.layer, c.ids, c.count);
}
