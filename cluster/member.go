package cluster

import (
	"errors"
	"fmt"
	"strings"

	"mailproxy/db"
)

// A refusal is how a daemon answers what it does not do. Code is one of memberCodes, or empty.
type refusal struct {
	Error string `json:"error"`
	Code  string `json:"code,omitempty"`
}

// memberCodes are the refusals that a command has a remedy for; both sides read this table.
var memberCodes = map[string]error{
	"not_master": ErrNotMaster, "name_taken": ErrNameTaken, "address_taken": ErrAddressTaken, "no_such_node": ErrNoSuchNode,
	"bad_request": ErrBadRequest, "no_data_key": ErrNoDataKey,
	"no_lease": db.ErrNoLease, "disk_full": db.ErrDiskFull, "stale": db.ErrStale,
}

// refusalOf makes an error one that a member may be told.
func refusalOf(err error) refusal {
	r := refusal{Error: err.Error()}
	for code, sentinel := range memberCodes {
		if errors.Is(err, sentinel) {
			r.Code = code
			return r
		}
	}
	r.Error = "it could not be done there; the log of that node says why"
	return r
}

// sentinel gives a refusal as our error, with what its text says more.
func (r refusal) sentinel() error {
	text := clean(r.Error)
	known := memberCodes[r.Code]
	if known == nil {
		return errors.New(text)
	}
	_, more, _ := strings.Cut(text, known.Error())
	return fmt.Errorf("%w%s", known, more)
}
