-- A node's own steps: entering a cluster, promising, beginning a reign.

-- +goose Up
-- create_cluster makes a single node the first of a cluster. Its rows stay; what it was belongs to the line as epoch 0.0.
-- +goose StatementBegin
CREATE FUNCTION node.create_cluster(id text, who integer) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF p.cluster_id <> '' OR p.cid <> 0 THEN
        RAISE EXCEPTION 'this node is in cluster % as CID %', p.cluster_id, p.cid USING ERRCODE = 'MP009';
    END IF;
    UPDATE node.position SET cid = who, cluster_id = id, epoch_n = 1, epoch_owner = who, promised_n = 1, promised_owner = who;
    INSERT INTO config.epoch (n, owner, first_serial, at) VALUES (0, 0, 0, now()), (1, who, p.serial + 1, now());
    INSERT INTO config.cluster (cluster_id, created_at) VALUES (id, now());
END $$;
-- +goose StatementEnd

-- enter empties this node for the cluster that it joins: it has promised the master's epoch and waits for its push. What it held
-- is gone, as the one who joins was told. The same again changes nothing.
-- +goose StatementBegin
CREATE FUNCTION node.enter(id text, who integer, n bigint, owner integer) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position; t text;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF p.cluster_id = id AND p.cid = who THEN
        IF (n, owner) > (p.promised_n, p.promised_owner) THEN
            UPDATE node.position SET promised_n = n, promised_owner = owner;
        END IF;
        RETURN;
    END IF;
    IF p.cluster_id <> '' OR p.cid <> 0 THEN
        RAISE EXCEPTION 'this node is in cluster % as CID %', p.cluster_id, p.cid USING ERRCODE = 'MP009';
    END IF;
    PERFORM node.begin_apply();
    FOR t IN SELECT node.tables() LOOP
        EXECUTE format('DELETE FROM config.%I', t);
    END LOOP;
    UPDATE node.position SET cid = who, cluster_id = id, epoch_n = 0, epoch_owner = 0, serial = 0, promised_n = n, promised_owner = owner,
        pushed_at = NULL, rewrites = rewrites + 1, apply_xid = NULL, apply_at = NULL;
    PERFORM pg_notify('mailproxy', '');
END $$;
-- +goose StatementEnd

-- promise_self promises an epoch to anyone, this node included. The same again is no error.
-- +goose StatementBegin
CREATE FUNCTION node.promise_self(n bigint, owner integer) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    PERFORM node.set_promise(p, n, owner);
END $$;
-- +goose StatementEnd

-- begin_epoch puts this node's own promised epoch in force, as a new commit on the line that it holds.
-- +goose StatementBegin
CREATE FUNCTION node.begin_epoch(n bigint, owner integer) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE p node.position;
BEGIN
    SELECT * INTO STRICT p FROM node.position FOR UPDATE;
    IF owner <> p.cid OR (n, owner) <> (p.promised_n, p.promised_owner) OR (n, owner) <= (p.epoch_n, p.epoch_owner) THEN
        RAISE EXCEPTION 'epoch %.% is promised', p.promised_n, p.promised_owner
            USING ERRCODE = 'MP002', DETAIL = p.promised_owner::text;
    END IF;
    UPDATE node.position SET epoch_n = n, epoch_owner = owner;
    INSERT INTO config.epoch VALUES (n, owner, p.serial + 1, now());
END $$;
-- +goose StatementEnd
