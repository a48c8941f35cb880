-- The lease: a master with other members takes configuration only for a while after a majority of them was last heard to stand behind it,
-- so that one that is cut off does not go on collecting commits which the others will set aside.

-- +goose Up
-- One row, or none: no lease. Unlogged, so that it does not outlive a crash of the server.
CREATE UNLOGGED TABLE node.lease (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    heard_at timestamptz NOT NULL, -- when a majority was last heard
    until    timestamptz NOT NULL
);
-- Set by a promote that was forced, until a majority is heard again: without it no configuration could be changed, dead members deleted least.
ALTER TABLE node.position ADD COLUMN lease_waived boolean NOT NULL DEFAULT false;

-- has_lease says whether this node, if it is the master, may write. A clock that was set back makes no lease longer, since it would
-- then begin in the future.
-- +goose StatementBegin
CREATE FUNCTION node.has_lease() RETURNS boolean LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.cid = 0 OR p.lease_waived OR (SELECT count(*) FROM config.node) < 2
        OR EXISTS (SELECT FROM node.lease WHERE clock_timestamp() BETWEEN heard_at - interval '1 second' AND until)
    FROM node.position p
$$;
-- +goose StatementEnd

-- renew_lease notes that a majority was heard so long ago, and that this is good for so long from then; or, of two nodes, that the other
-- was asked. A waiver ends where by_majority, in the epoch in force: one that was heard in another epoch ends nothing.
-- +goose StatementBegin
CREATE FUNCTION node.renew_lease(n bigint, owner integer, heard interval, good_for interval, by_majority boolean) RETURNS void LANGUAGE sql
SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO node.lease (heard_at, until) VALUES (clock_timestamp() - heard, clock_timestamp() - heard + good_for)
    ON CONFLICT (only_row) DO UPDATE SET heard_at = excluded.heard_at, until = excluded.until;
    UPDATE node.position SET lease_waived = false WHERE by_majority AND lease_waived AND (epoch_n, epoch_owner) = (n, owner);
$$;
-- +goose StatementEnd

-- end_lease takes the lease away, and a waiver of it.
-- +goose StatementBegin
CREATE FUNCTION node.end_lease() RETURNS void LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE node.position SET lease_waived = false WHERE lease_waived;
    DELETE FROM node.lease;
$$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION node.guard() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    -- The lock comes first of all: commits, pushes and promises wait for each other here, and never deadlock later.
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF node.applying() THEN
        RETURN NULL;
    END IF;
    IF NOT (p.epoch_owner = p.cid AND p.promised_n = p.epoch_n AND p.promised_owner = p.epoch_owner) THEN
        RAISE EXCEPTION 'configuration is written on the master (CID %), this is CID %', p.promised_owner, p.cid
            USING ERRCODE = 'MP001', DETAIL = p.promised_owner::text;
    END IF;
    IF NOT node.has_lease() THEN
        RAISE EXCEPTION 'no majority of the nodes stands behind this master' USING ERRCODE = 'MP011';
    END IF;
    RETURN NULL;
END $$;
-- +goose StatementEnd

-- begin_epoch puts this node's own promised epoch in force, as a new commit on the line that it holds. The promises are a lease;
-- one that was forced has too few of them. Of four members and more a majority must hold the epoch first: else another majority of a
-- member list that was changed at once could pass by it.
DROP FUNCTION node.begin_epoch(bigint, integer);
-- +goose StatementBegin
CREATE FUNCTION node.begin_epoch(n bigint, owner integer, good_for interval, forced boolean) RETURNS void LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF owner <> p.cid OR (n, owner) <> (p.promised_n, p.promised_owner) OR (n, owner) <= (p.epoch_n, p.epoch_owner) THEN
        RAISE EXCEPTION 'epoch %.% is promised', p.promised_n, p.promised_owner
            USING ERRCODE = 'MP002', DETAIL = p.promised_owner::text;
    END IF;
    UPDATE node.position SET epoch_n = n, epoch_owner = owner, lease_waived = forced;
    PERFORM node.renew_lease(n, owner, interval '0', good_for, false);
    INSERT INTO config.epoch VALUES (n, owner, p.serial + 1, now());
    IF (SELECT count(*) FROM config.node) > 3 THEN
        DELETE FROM node.lease;
    END IF;
END $$;
-- +goose StatementEnd

-- export_delta gives what the commits after a position touched, as the rows are now, at exactly (n, owner, at_serial). It refuses
-- where history does not lead from there to here.
-- +goose StatementBegin
CREATE FUNCTION node.export_delta(n bigint, owner integer, at_serial bigint, from_n bigint, from_owner integer, from_serial bigint)
RETURNS TABLE (tab text, op text, row_ jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
BEGIN
    PERFORM node.caller('peer|push');
    IF NOT EXISTS (SELECT FROM node.position p WHERE (p.epoch_n, p.epoch_owner, p.serial) = (n, owner, at_serial)) THEN
        RAISE EXCEPTION 'not at %.%/% any more', n, owner, at_serial USING ERRCODE = 'MP007';
    END IF;
    IF NOT node.can_delta(from_n, from_owner, from_serial) THEN
        RAISE EXCEPTION 'history does not lead from %.%/% to %.%/%', from_n, from_owner, from_serial, n, owner, at_serial
            USING ERRCODE = 'MP012';
    END IF;
    RETURN QUERY EXECUTE node.delta_sql(from_serial);
END $$;
-- +goose StatementEnd
GRANT EXECUTE ON FUNCTION node.export_delta(bigint, integer, bigint, bigint, integer, bigint) TO mailproxy_peer, mailproxy_push;

-- adopt is push that a node asks for: one that promotes itself takes the newest position that its voters know, under its own promise
-- and before it has begun that epoch; a slave takes its master's again. Tables in whole lose what was not staged.
DROP FUNCTION node.adopt(bigint, integer, bigint, bytea);
-- +goose StatementBegin
CREATE FUNCTION node.adopt(to_n bigint, to_owner integer, to_serial bigint, to_digest bytea, whole text[], OUT journalled bigint, OUT touched bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF NOT (p.promised_owner = p.cid AND (p.promised_n, p.promised_owner) > (to_n, to_owner)
                AND (p.promised_n, p.promised_owner) > (p.epoch_n, p.epoch_owner)
            OR p.promised_owner <> p.cid AND (p.promised_n, p.promised_owner) = (to_n, to_owner)) THEN
        RAISE EXCEPTION 'epoch %.% is promised', p.promised_n, p.promised_owner
            USING ERRCODE = 'MP002', DETAIL = p.promised_owner::text;
    END IF;
    SELECT a.journalled, a.touched INTO journalled, touched FROM node.apply_staged(to_n, to_owner, to_serial, to_digest,
        whole, p.promised_n, p.promised_owner) a;
END $$;
-- +goose StatementEnd
