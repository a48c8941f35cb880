-- Bringing back a backup. Its rows lie in the staging table, under their table's full name ("config.domain").
-- A table of config that says who is in which cluster says so in its comment ("cluster: ..."): its rows come back only together with
-- the node's identity.

-- +goose Up
COMMENT ON TABLE config.cluster IS 'cluster: which one it is';
COMMENT ON TABLE config.node IS 'cluster: its members';
COMMENT ON TABLE config.ca IS 'cluster: whose certificates its members trust';
COMMENT ON TABLE config.revoked IS 'cluster: who was a member';
COMMENT ON TABLE config.token IS 'cluster: who may enter it';
COMMENT ON TABLE config.epoch IS 'cluster: its reigns';

-- That this node was brought back with its identity, and how far the backup was. It counts as long as no master has pushed to the node.
CREATE TABLE node.restored (
    only_row    boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    made_at     timestamptz NOT NULL, -- the backup
    epoch_n     bigint NOT NULL,
    epoch_owner integer NOT NULL,
    serial      bigint NOT NULL,
    keys        boolean NOT NULL DEFAULT false -- whether the keys are in their place too, which comes last
);

-- of_cluster says whether a table of config belongs to the cluster that the rows were of.
-- +goose StatementBegin
CREATE FUNCTION node.of_cluster(t text) RETURNS boolean LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(obj_description(format('config.%I', t)::regclass, 'pg_class') LIKE 'cluster:%', false)
$$;
-- +goose StatementEnd

-- restore_rows makes every table of config what is staged, and adds to the tables of other schemas what they lack. tabs gives the
-- columns of each table in the backup; those that came later take their defaults.
-- +goose StatementBegin
CREATE FUNCTION node.restore_rows(tabs jsonb) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE t text; own text; name text;
BEGIN
    PERFORM node.begin_apply();
    FOR t IN SELECT node.tables() LOOP
        EXECUTE format('DELETE FROM config.%I', t);
    END LOOP;
    FOR t IN SELECT k FROM jsonb_object_keys(tabs) k ORDER BY k COLLATE "C" LOOP -- a journal before its changes
        own := split_part(t, '.', 1);
        name := substr(t, length(own) + 2);
        EXECUTE format('INSERT INTO %1$I.%2$I (%3$s) OVERRIDING SYSTEM VALUE SELECT %4$s FROM pg_temp.staging s
            CROSS JOIN LATERAL jsonb_populate_record(NULL::%1$I.%2$I, s.row) r WHERE s.tab = %5$L %6$s', own, name,
            (SELECT string_agg(quote_ident(c), ', ') FROM jsonb_array_elements_text(tabs->t) c),
            (SELECT string_agg(format('r.%I', c), ', ') FROM jsonb_array_elements_text(tabs->t) c), t,
            CASE own WHEN 'config' THEN '' ELSE 'ON CONFLICT DO NOTHING' END);
    END LOOP;
    PERFORM setval(pg_get_serial_sequence('node.journal', 'id'), coalesce((SELECT max(id) FROM node.journal), 0) + 1, false);
END $$;
-- +goose StatementEnd

-- restore_single gives a single node the staged configuration, as one commit that follows both what was here and what the backup had:
-- serials do not go back. What the backup's history tells is of no cluster now, and so belongs to epoch 0.0.
-- +goose StatementBegin
CREATE FUNCTION node.restore_single(tabs jsonb, at_serial bigint) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF p.cluster_id <> '' OR p.cid <> 0 THEN
        RAISE EXCEPTION 'this node is in cluster % as CID %', p.cluster_id, p.cid USING ERRCODE = 'MP009';
    END IF;
    UPDATE pg_temp.staging SET row = row || '{"epoch_n": 0, "epoch_owner": 0}' WHERE tab IN ('config.history', 'config.change');
    PERFORM node.restore_rows(tabs);
    UPDATE node.position SET serial = greatest(serial, at_serial), rewrites = rewrites + 1, apply_xid = NULL, apply_at = NULL;
    PERFORM node.take_serial();
END $$;
-- +goose StatementEnd

-- restore_identity makes a single node the member that the backup is of. Whatever was promised or committed since the backup is not
-- known here, so the node comes back at position 0.0/0, as one that joins: it has no vote, is master of nothing, and is pushed to by
-- whoever reigns. It has promised what the backup had. The same again is no error before a master has pushed.
-- +goose StatementBegin
CREATE FUNCTION node.restore_identity(tabs jsonb, made timestamptz, id text, who integer, n bigint, owner integer, at_serial bigint,
    to_promise_n bigint, to_promise_owner integer) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position; again boolean;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    again := p.cluster_id = id AND p.cid = who AND p.epoch_n = 0 AND EXISTS (SELECT FROM node.restored);
    IF (p.cluster_id <> '' OR p.cid <> 0) AND NOT again THEN
        RAISE EXCEPTION 'this node is in cluster % as CID %', p.cluster_id, p.cid USING ERRCODE = 'MP009';
    END IF;
    PERFORM node.restore_rows(tabs);
    UPDATE node.position SET cid = who, cluster_id = id, epoch_n = 0, epoch_owner = 0, serial = 0, pushed_at = NULL,
        rewrites = rewrites + 1, apply_xid = NULL, apply_at = NULL, applied_digest = NULL;
    IF (to_promise_n, to_promise_owner) > (p.promised_n, p.promised_owner) THEN
        UPDATE node.position SET promised_n = to_promise_n, promised_owner = to_promise_owner;
    END IF;
    INSERT INTO node.restored (made_at, epoch_n, epoch_owner, serial) VALUES (made, n, owner, at_serial)
    ON CONFLICT (only_row) DO UPDATE SET made_at = excluded.made_at, epoch_n = excluded.epoch_n, epoch_owner = excluded.epoch_owner,
        serial = excluded.serial, keys = false;
    PERFORM pg_notify('mailproxy', '');
END $$;
-- +goose StatementEnd

-- keys_restored notes the last step: the keys are in their place. The daemon is woken to read them.
-- +goose StatementBegin
CREATE FUNCTION node.keys_restored() RETURNS void LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    UPDATE node.restored SET keys = true;
    SELECT pg_notify('mailproxy', '');
$$;
-- +goose StatementEnd
