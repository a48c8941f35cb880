-- What a master trims from its history may be all that is left of it: commits that another node has not seen would be gone from here
-- before that node could set them aside.

-- +goose Up
-- Commits that were trimmed here and that not every member is known to hold. This node's alone, so that the trimmed history itself stays
-- a function of the rows.
CREATE TABLE node.trimmed (
    serial      bigint,
    epoch_n     bigint,
    epoch_owner integer,
    at          timestamptz NOT NULL,
    who         text NOT NULL,
    node        integer NOT NULL,
    command     text NOT NULL,
    PRIMARY KEY (serial, epoch_n, epoch_owner)
);
CREATE TABLE node.trimmed_change (
    serial      bigint,
    epoch_n     bigint,
    epoch_owner integer,
    seq         bigint,
    tab         text NOT NULL,
    op          text NOT NULL,
    key         jsonb NOT NULL,
    old         jsonb,
    new         jsonb,
    PRIMARY KEY (serial, epoch_n, epoch_owner, seq),
    FOREIGN KEY (serial, epoch_n, epoch_owner) REFERENCES node.trimmed ON DELETE CASCADE
);

-- Whoever leaves a cluster, or enters one, has nobody to keep them for: in another cluster they would be taken for its commits.
-- +goose StatementBegin
CREATE FUNCTION node.other_cluster() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    DELETE FROM node.trimmed;
    RETURN NULL;
END $$;
-- +goose StatementEnd
CREATE TRIGGER other_cluster AFTER UPDATE OF cluster_id ON node.position
    FOR EACH ROW WHEN (OLD.cluster_id <> NEW.cluster_id) EXECUTE FUNCTION node.other_cluster();

-- trim_history keeps the newest 1,000 commits, and of those the ones within 90 days before the newest. It looks at nothing but
-- the rows, so that every node keeps the same ones. A master keeps a copy of the others.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.trim_history() RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE newest config.history; bound bigint;
BEGIN
    SELECT * INTO newest FROM config.history ORDER BY serial DESC, epoch_n DESC, epoch_owner DESC LIMIT 1;
    SELECT max(serial) INTO bound FROM config.history WHERE serial <= newest.serial - 1000 OR at < newest.at - interval '90 days';
    IF bound IS NOT NULL THEN
        -- What is being applied is another node's, which has it.
        IF (SELECT cid > 0 FROM node.position) AND NOT node.applying() THEN
            INSERT INTO node.trimmed (serial, epoch_n, epoch_owner, at, who, node, command)
                SELECT serial, epoch_n, epoch_owner, at, who, node, command FROM config.history WHERE serial <= bound
                ON CONFLICT DO NOTHING;
            INSERT INTO node.trimmed_change (serial, epoch_n, epoch_owner, seq, tab, op, key, old, new)
                SELECT serial, epoch_n, epoch_owner, seq, tab, op, key, old, new FROM config.change WHERE serial <= bound
                ON CONFLICT DO NOTHING;
        END IF;
        DELETE FROM config.change WHERE serial <= bound;
        DELETE FROM config.history WHERE serial <= bound;
    END IF;
END $$;
-- +goose StatementEnd

-- forget_trimmed drops what every member holds: all up to a serial of the epoch that is in force here.
-- +goose StatementBegin
CREATE FUNCTION node.forget_trimmed(n bigint, owner integer, held bigint) RETURNS bigint LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS $$
    WITH gone AS (
        DELETE FROM node.trimmed t USING node.position p
        WHERE t.serial <= held AND (p.epoch_n, p.epoch_owner) = (n, owner) RETURNING t.serial
    )
    SELECT count(*) FROM gone
$$;
-- +goose StatementEnd

-- set_aside moves to the journal the own commits that the sender's history lacks: not on its line, or another one in its place. Those
-- that were trimmed here count as well.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.set_aside(to_n bigint, to_owner integer, to_serial bigint, by_n bigint, by_owner integer) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE m bigint;
BEGIN
    WITH others AS MATERIALIZED (
        SELECT r.* FROM pg_temp.staging s CROSS JOIN LATERAL jsonb_populate_record(NULL::config.history, s.row) r WHERE s.tab = 'history'
    ), own AS (
        SELECT serial, epoch_n, epoch_owner, at, who, node, command FROM config.history
        UNION SELECT serial, epoch_n, epoch_owner, at, who, node, command FROM node.trimmed
    ), aside AS (
        INSERT INTO node.journal (epoch_n, epoch_owner, serial, at, who, node, command, by_n, by_owner)
        SELECT h.epoch_n, h.epoch_owner, h.serial, h.at, h.who, h.node, h.command, by_n, by_owner
        FROM own h LEFT JOIN others o ON (o.serial, o.epoch_n, o.epoch_owner) = (h.serial, h.epoch_n, h.epoch_owner)
        WHERE node.orphan(h.epoch_n, h.epoch_owner, h.serial, to_n, to_owner, to_serial)
           OR o.serial IS NOT NULL AND (o.at, o.who, o.node, o.command) IS DISTINCT FROM (h.at, h.who, h.node, h.command)
        ORDER BY h.serial
        RETURNING id, serial, epoch_n, epoch_owner
    ), changes AS (
        INSERT INTO node.journal_change (id, seq, tab, op, key, old, new)
        SELECT a.id, c.seq, c.tab, c.op, c.key, c.old, c.new FROM aside a JOIN config.change c
            ON (c.serial, c.epoch_n, c.epoch_owner) = (a.serial, a.epoch_n, a.epoch_owner)
        UNION SELECT a.id, c.seq, c.tab, c.op, c.key, c.old, c.new FROM aside a JOIN node.trimmed_change c
            ON (c.serial, c.epoch_n, c.epoch_owner) = (a.serial, a.epoch_n, a.epoch_owner)
    ), moved AS (
        DELETE FROM node.trimmed t USING aside a WHERE (t.serial, t.epoch_n, t.epoch_owner) = (a.serial, a.epoch_n, a.epoch_owner)
    )
    SELECT count(*) INTO m FROM aside;
    RETURN m;
END $$;
-- +goose StatementEnd
