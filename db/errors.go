package db

import (
	"errors"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"

	"mailproxy/config"
)

var (
	// ErrNotMaster is a write on a node that is not the master; a *NotMasterError carries who is.
	ErrNotMaster = errors.New("not the master")
	// ErrNoSuch is a row that is not there.
	ErrNoSuch = errors.New("no such object")
	// ErrExists is a step that was taken before: this node is in a cluster.
	ErrExists = errors.New("is in a cluster already")
	// ErrStale is an epoch below the highest that the node has promised.
	ErrStale = errors.New("a higher epoch is promised")
	// ErrAhead is a peer that holds more commits of our own epoch than we do: our store was rolled back.
	ErrAhead = errors.New("the peer is ahead in our own epoch")
	// ErrDrift is a push after which the rows were still not the same.
	ErrDrift = errors.New("rows differ after the push")
	// ErrBusy is a peer that another push is under way to.
	ErrBusy = errors.New("the peer is busy")
	// ErrNewer is a peer whose schema is older than ours.
	ErrNewer = errors.New("the peer's schema is older than ours")
	// ErrMoved is a peer that is not at the position that was asked for, or this node where it is not at the one that was compared.
	ErrMoved = errors.New("the position is another by now")
	// ErrNewerBackup is a backup that holds what this schema does not have.
	ErrNewerBackup = errors.New("the backup was made by a newer version")
	// ErrByHand is an undoing past a commit of rows that were changed by hand.
	ErrByHand = errors.New("rows that were changed by hand became a commit, and what they were before is in no history")
	// ErrNoDataKey is a node that cannot open the secrets' data key: its key file is away, or is another than the one it was wrapped for.
	ErrNoDataKey = errors.New("the secrets' data key does not open here")
	// ErrNoLease is a write on a master that has not heard a majority of the nodes for too long.
	ErrNoLease = errors.New("no majority of the nodes was heard lately")
	// ErrOtherCluster is a peer in another cluster.
	ErrOtherCluster = errors.New("the peer is in another cluster")
	// ErrNotMember is a caller who is no member, or may not do this as one.
	ErrNotMember = errors.New("not a member with this right")
	// ErrFarEpoch is a promise for an epoch too far above those known.
	ErrFarEpoch = errors.New("epoch is too far above those known")
	// ErrTokenUnknown is a join token that was never made, or is forgotten.
	ErrTokenUnknown = errors.New("unknown join token")
	// ErrTokenUsed is a join token that another key took.
	ErrTokenUsed = errors.New("join token is used")
	// ErrTokenExpired is a join token whose time is over.
	ErrTokenExpired = errors.New("join token has expired")
	// ErrDiskFull is a write that found no room on the server's disk; nothing was changed.
	ErrDiskFull = errors.New("the database's disk is full")
	// ErrDisconnected is a change whose connection was lost, at COMMIT or before; nothing was changed.
	ErrDisconnected = errors.New("the connection to the database was lost, and nothing was changed")
	// ErrInDoubt is a commit whose connection was lost at COMMIT, and no server has answered since.
	ErrInDoubt = errors.New("the connection to the database was lost at COMMIT, and no server says whether the change was made")
	// ErrDatabaseExists is a database that was made before.
	ErrDatabaseExists = errors.New("database exists")
	// ErrPathTooLong is a socket path over the kernel's limit.
	ErrPathTooLong = errors.New("socket path is too long")
	// ErrNoSchema is a server without our database, or with a schema in it that is not this program's, or not yet.
	ErrNoSchema = errors.New("the database is not set up for this program")
	// ErrNoPostgres is a host without PostgreSQL's programs.
	ErrNoPostgres = errors.New("PostgreSQL is not installed")
)

// errNoPath is a position from which the peer's history does not lead on.
var errNoPath = errors.New("history does not lead there")

// A NotMasterError is ErrNotMaster with the node that is.
type NotMasterError struct {
	Master config.CID // owner of the highest promised epoch; 0 where unknown
}

func (e *NotMasterError) Error() string {
	if e.Master == 0 {
		return ErrNotMaster.Error()
	}
	return fmt.Sprintf("not the master: that is CID %d", e.Master)
}

func (e *NotMasterError) Unwrap() error { return ErrNotMaster }

// sqlErrors maps the SQLSTATEs that the functions of schema node raise.
var sqlErrors = map[string]error{
	"MP002": ErrStale,
	"MP003": ErrNotMember,
	"MP004": ErrDrift,
	"MP005": ErrFarEpoch,
	"MP006": ErrNewer,
	"MP007": ErrMoved,
	"MP008": ErrOtherCluster,
	"MP009": ErrExists,
	"MP010": ErrAhead,
	"MP011": ErrNoLease,
	"MP012": errNoPath,
	"53100": ErrDiskFull,
	"55P03": ErrBusy,     // a lock that is not to be had
	"3D000": ErrNoSchema, // no such database
	"3F000": ErrNoSchema, // schema
	"42P01": ErrNoSchema, // table
	"42883": ErrNoSchema, // function
}

// mapError puts our sentinel in front of what PostgreSQL said, by its code.
func mapError(err error) error {
	pg, ok := asPg(err)
	if !ok {
		return err
	}
	if pg.Code == "MP001" {
		cid, _ := strconv.ParseInt(pg.Detail, 10, 32) // 0 where it says nothing
		return &NotMasterError{Master: config.CID(cid)}
	}
	if sentinel, ok := sqlErrors[pg.Code]; ok {
		return fmt.Errorf("%w: %s", sentinel, pg.Message)
	}
	return err
}

// asPg gives PostgreSQL's own error where err holds one.
func asPg(err error) (*pgconn.PgError, bool) { return errors.AsType[*pgconn.PgError](err) }
